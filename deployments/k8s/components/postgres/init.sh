#!/bin/sh
# Run once by the image, on an empty data folder: a role and a database for each server, neither may read the other's.
set -eu
for name in prefect mlflow; do
    eval "password=\$$(echo "${name}" | tr '[:lower:]' '[:upper:]')_PASSWORD"
    psql --username "${POSTGRES_USER}" --dbname postgres --set ON_ERROR_STOP=1 \
        --set name="${name}" --set password="${password}" <<'SQL'
create role :"name" login password :'password';
create database :"name" owner :"name";
revoke all on database :"name" from public;
SQL
done
