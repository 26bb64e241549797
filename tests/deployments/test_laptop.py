from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments import processes
from deployments.errors import GiveUp
from deployments.exit_causes import cause_of
from deployments.job_folder import JobFolder
from deployments.laptop import IGNORED, Laptop
from deployments.processes import JOB_MARK as MARK
from deployments.spot_market import SpotMarket
from deployments.workload import Outcome, Runner, Workload

ROOT = Path(__file__).parents[2]
SLEEP = "print('up', flush=True); import time; time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
POLITE = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143))); " + SLEEP
# As torchrun: the worker has a session of its own and does not end with its parent.
WITH_WORKER = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
    + repr(STUBBORN)
    + """],
start_new_session=True); """
    + SLEEP
)
TRAINER = """
import json, sys, time
for step in range(1, 101):
    with open(sys.argv[1], "a") as file:
        print(json.dumps({"step": step, "max_steps": 100, "time": time.time()}), file=file)
    time.sleep(0.02)
"""


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    place: Runner = Laptop(tmp_path / "jobs")
    assert isinstance(place, Laptop)
    yield place
    left = {p: f for p, f in processes.marks(MARK).items() if f.startswith(str(tmp_path))}
    processes.send(left, signal.SIGKILL)
    assert not left, f"processes were left running: {left}"


def work(name: str, code: str, *args: str, **more: Any) -> Workload:
    return Workload(name=name, image=more.pop("image", "step"), command=("python", "-c", code, *args), **more)


def wait_for(what: Any, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def log_of(laptop: Laptop, name: str) -> str:
    path = laptop.jobs / name / "log.txt"
    return path.read_text() if path.exists() else ""


def start_elsewhere(laptop: Laptop, name: str, code: str, image: str = "step") -> subprocess.Popen[bytes]:
    """Another process that runs the workload and waits for it, as a flow does."""
    program = (
        "import sys; from pathlib import Path; from deployments.laptop import Laptop\n"
        "from deployments.workload import Workload\n"
        f"Laptop(Path({str(laptop.jobs)!r})).run(Workload(name={name!r}, image={image!r}, "
        f"command=('python', '-c', {code!r})))"
    )
    flow = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_for(lambda: "up" in log_of(laptop, name) and (laptop.jobs / name / "process.json").exists())
    return flow


def in_background(laptop: Laptop, workload: Workload) -> tuple[threading.Thread, list[Outcome]]:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(laptop.run(workload)))
    thread.start()
    return thread, outcomes


def test_request_result_placeholders_environment_and_lines(laptop: Laptop) -> None:
    code = (
        "import json, os, sys; request = json.load(open(sys.argv[1])); print('one'); print('two', end='')\n"
        "json.dump({'n': request['n'] + 1, 'omp': os.environ['OMP_NUM_THREADS'], 'x': os.environ['X'],"
        " 'cwd': os.getcwd()}, open(sys.argv[2], 'w'))"
    )
    lines: list[str] = []
    outcome = laptop.run(
        work("a-1", code, "{request}", "{result}", request={"n": 41}, env={"X": "y"}), on_line=lines.append
    )
    assert (outcome.exit_code, outcome.cause, outcome.adopted) == (0, "complete", False)
    assert outcome.result == {"n": 42, "omp": "1", "x": "y", "cwd": str(laptop.jobs / "a-1")}
    assert lines == ["one", "two"] == list(laptop.logs("a-1"))
    assert outcome.started <= outcome.ended <= time.time()
    assert Path(outcome.log).read_text() == "one\ntwo"


def test_finished_is_answered_and_not_done_again(laptop: Laptop) -> None:
    first = laptop.run(work("once", "open('ran', 'a').write('x')"))
    second = laptop.run(work("once", "open('ran', 'a').write('x')"))
    assert (laptop.jobs / "once" / "ran").read_text() == "x"
    assert second.adopted and not first.adopted
    assert (second.started, second.ended, second.exit_code) == (first.started, first.ended, 0)


def test_failed_is_started_anew_and_its_log_kept(laptop: Laptop) -> None:
    code = "import os, sys; new = not os.path.exists('seen'); open('seen', 'w'); print('new', new); sys.exit(7 * new)"
    assert laptop.run(work("again", code)).exit_code == 7
    assert laptop.run(work("again", code)).exit_code == 0
    folder = laptop.jobs / "again"
    assert (folder / "log.1.txt").read_text() == "new True\n"
    assert (folder / "log.txt").read_text() == "new False\n"
    assert json.loads((folder / "outcome.1.json").read_text())["cause"] == "user_error"


@pytest.mark.parametrize(
    ("command", "code", "cause"),
    [
        (("sh", "-c", "exit 3"), 3, "user_error"),
        (("no-such-program",), 127, "user_error"),
        (("sh", "-c", "kill -SEGV $$"), 139, "user_error"),
        (("sh", "-c", "kill -9 $$"), 137, "node_lost"),
        (("sh", "-c", "exit 143"), 143, "node_lost"),
        (("sh", "-c", "kill -INT $$"), 130, "cancelled"),
    ],
)
def test_causes(laptop: Laptop, command: tuple[str, ...], code: int, cause: str) -> None:
    outcome = laptop.run(Workload(name="x", image="step", command=command))
    assert (outcome.exit_code, outcome.cause) == (code, cause), outcome.reason


def test_out_of_memory_is_what_the_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.exit_causes.oom_kills", lambda: 5)
    assert cause_of(137, {}, 4)[0] == "out_of_memory"
    assert cause_of(137, {}, 5)[0] == "node_lost"
    assert cause_of(137, {"cause": "spot", "why": "taken"}, 4)[0] == "spot"
    assert cause_of(1, {"cause": "spot", "why": "taken"}, 5) == ("user_error", "exit 1 after taken")


def test_two_runners_start_it_once(laptop: Laptop) -> None:
    workload = work("both", "import time; open('ran', 'a').write('x'); time.sleep(0.3)")
    started = [in_background(Laptop(laptop.jobs), workload) for _ in range(4)]
    for thread, _ in started:
        thread.join()
    assert (laptop.jobs / "both" / "ran").read_text() == "x"
    assert sorted(outcome.adopted for _, (outcome,) in started) == [False, True, True, True]


def test_the_caller_killed_the_program_lives_and_is_adopted(laptop: Laptop) -> None:
    code = "import time; print('up', flush=True); open('ran', 'a').write('x'); time.sleep(1); print('done')"
    flow = start_elsewhere(laptop, "kept", code)
    flow.kill()
    flow.wait()
    lines: list[str] = []
    outcome = laptop.run(work("kept", code), on_line=lines.append)
    assert (outcome.exit_code, outcome.adopted, lines) == (0, True, ["up", "done"])
    assert (laptop.jobs / "kept" / "ran").read_text() == "x"


def test_an_attempt_that_failed_while_nobody_waited_is_told_once(laptop: Laptop) -> None:
    code = "import time, sys; print('up', flush=True); time.sleep(0.3); sys.exit(9)"
    flow = start_elsewhere(laptop, "t", code, image="train")
    flow.kill()
    flow.wait()
    supervisor = JobFolder(laptop.jobs / "t").supervisor()
    assert supervisor is not None
    wait_for(lambda: not supervisor.alive())
    told = laptop.run(work("t", code, image="train"))
    assert (told.exit_code, told.cause, told.adopted) == (9, "user_error", True)
    assert laptop.run(work("t", "pass", image="train")).exit_code == 0


def test_everything_killed_is_a_lost_node_for_an_attempt_and_a_new_start_for_a_step(laptop: Laptop) -> None:
    for image in ("train", "step"):
        flow = start_elsewhere(laptop, image, WITH_WORKER, image=image)
        supervisor = JobFolder(laptop.jobs / image).supervisor()
        assert supervisor is not None
        flow.kill()
        flow.wait()
        os.kill(supervisor.pid, signal.SIGKILL)  # the program and its worker are orphans now
        wait_for(lambda s=supervisor: not s.alive())
    lost = laptop.run(work("train", "pass", image="train"))
    assert (lost.exit_code, lost.cause, lost.adopted) == (None, "node_lost", True)
    assert processes.tree(MARK, str(laptop.jobs / "train")) == set()
    assert laptop.run(work("step", "pass")).exit_code == 0
    assert processes.tree(MARK, str(laptop.jobs / "step")) == set()


@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_a_start_that_was_never_recorded_is_found_again(laptop: Laptop, seconds: float) -> None:
    code = "import time; print('up', flush=True); open('ran', 'a').write('x'); time.sleep(0.5)"
    flow = start_elsewhere(laptop, "lost", code)
    flow.kill()
    flow.wait()
    (laptop.jobs / "lost" / "process.json").unlink()  # as if killed between the start and the note of it
    time.sleep(seconds)  # it runs still, or it has ended
    outcome = laptop.run(work("lost", code))
    assert (outcome.exit_code, outcome.adopted) == (0, True)
    assert (laptop.jobs / "lost" / "ran").read_text() == "x"


def test_a_start_that_never_came_to_be_is_made(laptop: Laptop) -> None:
    job = JobFolder(laptop.jobs / "early")
    with job.lock():
        job.write("start.json", {"started": 1.0})
    assert laptop.run(work("early", "pass")).adopted is False


def test_reap_kills_what_a_dead_supervisor_left_and_nothing_else(laptop: Laptop) -> None:
    lost, kept = (start_elsewhere(laptop, name, WITH_WORKER) for name in ("lost", "kept"))
    supervisor = JobFolder(laptop.jobs / "lost").supervisor()
    assert supervisor is not None
    for flow in (lost, kept):
        flow.kill()
        flow.wait()
    os.kill(supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not supervisor.alive())
    assert laptop.reap() == ["lost: 2 processes"]
    assert laptop.reap() == []
    assert len(processes.tree(MARK, str(laptop.jobs / "kept"))) >= 2
    laptop.stop("kept", grace_seconds=0)


def test_a_signal_to_the_whole_group_still_leaves_the_exit_code(laptop: Laptop) -> None:
    thread, outcomes = in_background(laptop, work("group", POLITE))
    wait_for(lambda: "up" in log_of(laptop, "group"))
    supervisor = JobFolder(laptop.jobs / "group").supervisor()
    assert supervisor is not None
    os.killpg(supervisor.pid, signal.SIGTERM)
    thread.join()
    assert (outcomes[0].exit_code, outcomes[0].cause) == (143, "node_lost")
    assert "saved" in log_of(laptop, "group")


def test_stop_lets_the_program_save_and_takes_the_rest(laptop: Laptop) -> None:
    thread, outcomes = in_background(laptop, work("s", POLITE))
    wait_for(lambda: "up" in log_of(laptop, "s"))
    laptop.stop("s")
    thread.join()
    assert (outcomes[0].exit_code, outcomes[0].cause) == (143, "cancelled")
    assert "saved" in log_of(laptop, "s")


def test_stop_kills_the_whole_tree_after_the_grace(laptop: Laptop) -> None:
    thread, outcomes = in_background(laptop, work("s", STUBBORN.replace(SLEEP, WITH_WORKER)))
    wait_for(lambda: log_of(laptop, "s").count("up") == 2)
    began = time.monotonic()
    Laptop(laptop.jobs).stop("s", grace_seconds=0.3)
    assert 0.3 <= time.monotonic() - began < 3
    thread.join()
    assert (outcomes[0].exit_code, outcomes[0].cause) == (137, "cancelled")
    assert processes.tree(MARK, str(laptop.jobs / "s")) == set()


def test_stop_of_what_is_not_there(laptop: Laptop) -> None:
    laptop.stop("never-started")
    assert laptop.run(work("done", "pass")).cause == "complete"
    laptop.stop("done")
    assert laptop.run(work("done", "pass")).cause == "complete"


def test_deadline(laptop: Laptop) -> None:
    outcome = laptop.run(work("slow", STUBBORN, deadline_seconds=0.3, grace_seconds=0.2))
    assert (outcome.exit_code, outcome.cause) == (137, "deadline")
    assert "0.3 s" in outcome.reason


def test_what_a_finished_program_left_running_is_taken(laptop: Laptop) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', " + repr(SLEEP) + "])"
    assert laptop.run(work("daemon", code)).exit_code == 0
    assert processes.tree(MARK, str(laptop.jobs / "daemon")) == set()


def test_an_error_while_waiting_leaves_it_running(laptop: Laptop) -> None:
    def refuse(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        laptop.run(work("busy", SLEEP), on_line=refuse)
    supervisor = JobFolder(laptop.jobs / "busy").supervisor()
    assert supervisor is not None and supervisor.alive()
    laptop.stop("busy", grace_seconds=0)


def test_the_spot_market_takes_a_training_twice_and_no_more(laptop: Laptop, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    market = SpotMarket(["notice@20%", "kill@60%"], grace_seconds=0.2)
    spot = Laptop(laptop.jobs, market=market)
    outcomes = []
    for attempt in (1, 2, 3):
        workload = work(
            f"t-{attempt}", TRAINER, str(progress), spot=True, image="train", env={"REPRISE_PROGRESS": str(progress)}
        )
        outcomes.append(spot.run(workload))
    assert [(o.exit_code, o.cause) for o in outcomes] == [(143, "spot"), (137, "spot"), (0, "complete")]
    assert [o.notice is not None for o in outcomes] == [True, False, False]
    assert {o.capacity for o in outcomes} == {"spot"}
    assert "notice@20%" in outcomes[0].reason and "kill@60%" in outcomes[1].reason


def test_the_grace_of_a_notice_ends_in_a_kill_of_the_tree(laptop: Laptop, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    spot = Laptop(laptop.jobs, market=SpotMarket(["notice@0.3s"], grace_seconds=0.3))
    env = {"REPRISE_PROGRESS": str(progress)}
    outcome = spot.run(work("t", STUBBORN.replace(SLEEP, WITH_WORKER), spot=True, env=env))
    assert (outcome.exit_code, outcome.cause) == (137, "spot")
    assert outcome.notice is not None and 0.2 < outcome.ended - outcome.notice < 3
    assert processes.tree(MARK, str(laptop.jobs / "t")) == set()


def test_the_market_leaves_on_demand_work_alone(laptop: Laptop, tmp_path: Path) -> None:
    spot = Laptop(laptop.jobs, market=SpotMarket(["kill@0.1s"]))
    env = {"REPRISE_PROGRESS": str(tmp_path / "progress.jsonl")}
    outcome = spot.run(work("t", "import time; time.sleep(0.4)", env=env))
    assert (outcome.cause, outcome.capacity) == ("complete", "on-demand")


def test_logs_follow_until_the_end(laptop: Laptop) -> None:
    thread, _ = in_background(
        laptop, work("l", "import time; print('up', flush=True); time.sleep(0.3); print('x\\ry')")
    )
    wait_for(lambda: "up" in log_of(laptop, "l"))
    assert list(laptop.logs("l", follow=True)) == ["up", "y"]
    thread.join()
    with pytest.raises(GiveUp, match="never started"):
        list(laptop.logs("other"))


@pytest.mark.parametrize("name", ["", "../up", "A", "a_b", "-a", "a" * 64])
def test_a_name_that_is_no_dns_label_is_refused(laptop: Laptop, name: str) -> None:
    with pytest.raises(GiveUp, match="DNS label"):
        laptop.run(work(name, "pass"))


def test_a_result_that_is_no_json_is_none(laptop: Laptop) -> None:
    assert laptop.run(work("r", "import sys; open(sys.argv[1], 'w').write('{')", "{result}")).result is None


def test_what_is_ignored_is_told_and_changes_nothing(laptop: Laptop) -> None:
    assert set(IGNORED) <= set(Workload.__dataclass_fields__)
    assert laptop.run(work("i", "open('ran', 'a').write('x')", replicas=3, processes=2)).exit_code == 0
    assert (laptop.jobs / "i" / "ran").read_text() == "x"


def test_cost_of_import_and_of_one_process(laptop: Laptop) -> None:
    code = "import time; t = time.process_time(); import deployments.laptop, sys; print(time.process_time() - t)"
    code += "; assert 'psutil' not in sys.modules"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) for _ in range(5)]
    assert min(seconds) < 0.05
    laptop.run(Workload(name="warm", image="step", command=("true",)))
    costs = []
    for number in range(5):
        began = time.perf_counter()
        laptop.run(Workload(name=f"n{number}", image="step", command=("true",)))
        costs.append(time.perf_counter() - began)
    assert min(costs) < 0.1  # measured: 6 ms on a quiet machine, half of it the look for what it left running
