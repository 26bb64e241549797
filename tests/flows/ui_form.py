"""Prefect's own UI in a real Chromium, as a person uses it: form, wrong value, run, cancel, retry, approval.

    python -m venv /tmp/ui && /tmp/ui/bin/pip install playwright        # drives the Chromium that the machine has
    reprise deploy                                                       # in a project with [deploy] approval = true
    /tmp/ui/bin/python tests/flows/ui_form.py http://127.0.0.1:14200 digits main pictures/

Each step is checked through Prefect's API and leaves a picture. A program and not a test: neither a browser nor
playwright is a dependency of Reprise. Exit code 1 at the first step that does not do what it should.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright


class Ui:
    """A page of Prefect's UI and the API behind it."""

    def __init__(self, page: Page, server: str, pictures: Path) -> None:
        self.page, self.server, self.pictures = page, server, pictures

    def api(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.server}/api{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def open(self, path: str, text: str) -> None:
        self.page.goto(self.server + path)
        self.page.wait_for_selector(f"text={text}")
        self.page.wait_for_timeout(1500)

    def click(self, button: str) -> None:
        self.page.locator(f"button:has-text('{button}')").last.click()
        self.page.wait_for_timeout(1500)

    def picture(self, name: str) -> None:
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def run(self, flow_run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api(f"/flow_runs/{flow_run}")
        return found

    def newest(self, deployment: str) -> dict[str, Any]:
        """The last that somebody started; those that a schedule has in store are none."""
        started = {"expected_start_time": {"before_": datetime.now(UTC).isoformat()}}
        wanted = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": started}
        body = {**wanted, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
        found: list[dict[str, Any]] = self.api("/flow_runs/filter", body)
        return found[0] if found else {"id": ""}

    def wait(self, flow_run: str, *names: str, seconds: float = 240) -> str:
        until, state = time.monotonic() + seconds, ""
        while time.monotonic() < until:
            state = self.run(flow_run)["state"]["name"]
            if state in names:
                print(f"  {state}", flush=True)
                return str(state)
            time.sleep(0.5)
        sys.exit(f"the run is {state}; expected {' or '.join(names)} within {seconds:g} s")


def expect(what: str, holds: bool) -> None:
    """Tell a check, and end at the first that does not hold."""
    print(f"{'ok' if holds else 'NOT OK'}: {what}", flush=True)
    if not holds:
        sys.exit(1)


def walk(ui: Ui, pipeline: str, rev: str, seed: int) -> None:
    """The whole way of a person through the UI."""
    page = ui.page
    deployment = ui.api(f"/deployments/name/retrain/{pipeline}")["id"]
    before = ui.newest(deployment)["id"]

    ui.open(f"/deployments/deployment/{deployment}/run", "Epochs")
    ui.picture("form")
    epochs, seeds = page.locator("input[type=number]").nth(0), page.locator("input[type=number]").nth(2)
    epochs.fill("0")
    ui.click("Submit")
    text = page.inner_text("body")
    expect("a wrong value is refused, with field and bound", "'train.epochs'" in text and "minimum of 1" in text)
    ui.picture("wrong-value")
    expect("and no run was made", ui.newest(deployment)["id"] == before)

    page.locator("textarea").first.fill(rev)
    epochs.fill("14")
    seeds.fill(str(seed))
    ui.click("Submit")
    until, flow_run = time.monotonic() + 20, before
    while flow_run == before and time.monotonic() < until:
        flow_run = ui.newest(deployment)["id"]
    if flow_run == before:
        ui.picture("not-taken")
    expect("a right one is taken", flow_run != before)
    ui.wait(flow_run, "Running")
    ui.open(f"/runs/flow-run/{flow_run}", "Running")
    page.wait_for_selector("text=train_model", timeout=120_000)
    page.wait_for_timeout(6000)
    ui.picture("running")
    name = ui.run(flow_run)["name"]
    expect(f"its name says run, commit and cause: {name}", name.startswith(f"{pipeline}-") and name.endswith(" form"))

    ui.click("Cancel")
    ui.click("Confirm")
    ui.wait(flow_run, "Cancelled", seconds=60)
    page.wait_for_timeout(3000)
    ui.picture("cancelled")

    ui.open(f"/runs/flow-run/{flow_run}", "Cancelled")
    ui.click("Retry")
    page.locator(".p-modal button:has-text('Retry')").last.click()
    ui.wait(flow_run, "Suspended")
    expect("the same run went on", ui.run(flow_run)["name"] == name)

    ui.open(f"/runs/flow-run/{flow_run}", "Suspended")
    ui.click("Resume")
    page.wait_for_timeout(1500)
    ui.picture("approval")
    text = page.inner_text("body")
    expect("the approval asks for a decision", "Decision" in text and "accuracy" in text)
    ui.click("Submit")
    text = page.inner_text("body")
    expect("no decision is none", "required" in text and ui.run(flow_run)["state"]["name"] == "Suspended")
    page.locator(".p-modal .p-select-button").click()
    page.keyboard.press("ArrowDown")
    page.locator("[class*=select-option] >> text=/^deploy$/").last.click()
    ui.click("Submit")
    ui.wait(flow_run, "Completed")
    message = ui.run(flow_run)["state"]["message"]
    expect(f"its state says what came of it: {message}", "is in service" in message)
    keys = [a["key"] for a in ui.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}})]
    expect(f"cancelled, retried, approved, it shows each thing once: {sorted(keys)}", len(keys) == len(set(keys)) == 4)
    ui.open(f"/runs/flow-run/{flow_run}", "Completed")
    page.wait_for_timeout(3000)
    ui.picture("completed")
    page.locator("text=Artifacts").last.click()
    page.wait_for_timeout(3000)
    ui.picture("artifacts")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="http://127.0.0.1:14200")
    parser.add_argument("pipeline", help="its name: digits")
    parser.add_argument("rev", help="a revision whose pipeline.toml says [deploy] approval = true")
    parser.add_argument("pictures", type=Path, help="a folder for the pictures")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()) % 100_000, help="of the training: a new one is new"
    )
    arguments = parser.parse_args()
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        walk(Ui(page, arguments.server, arguments.pictures), arguments.pipeline, arguments.rev, arguments.seed)
        browser.close()


if __name__ == "__main__":
    main()
