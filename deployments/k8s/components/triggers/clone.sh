#!/bin/sh
# The project's repository on the pod's volume, at what the remote's default branch says. Killed in the middle, the next
# start clones anew. Runs before the receiver and before the Job.
set -eu
if [ ! -d /data/project/.git ]; then
  rm -rf /data/new
  git clone --quiet --no-recurse-submodules --end-of-options "$GIT_URL" /data/new
  mv /data/new /data/project
fi
cd /data/project
git remote set-url origin "$GIT_URL"
git fetch --quiet --prune origin
git remote set-head origin --auto
git -c advice.detachedHead=false checkout --quiet --force --detach origin/HEAD
