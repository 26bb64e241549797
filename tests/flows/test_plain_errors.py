"""What Prefect logs of an error: a sentence for ours, the stack for a bug."""

from __future__ import annotations

import logging

import pytest

from deployments.errors import ConfigError
from flows.plain_errors import LOGGERS, plain_errors


class Kept(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("name", LOGGERS)
def test_ours_is_a_sentence_and_a_bug_keeps_its_stack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_errors()
    plain_errors()
    logger, kept = logging.getLogger(name), Kept()
    assert len([f for f in logger.filters if type(f).__module__ == "flows.plain_errors"]) == 1
    monkeypatch.setattr(logger, "handlers", [kept])  # Prefect's own, once it is set up, wants a flow run
    monkeypatch.setattr(logger, "propagate", False)
    for error in (ConfigError("revision 'nowhere' does not exist"), ZeroDivisionError("a bug")):
        try:
            raise error
        except type(error) as caught:
            logger.exception("Encountered exception during execution: %r", caught)
    ours, bug = kept.records
    assert ours.getMessage() == "revision 'nowhere' does not exist" and ours.exc_info is None
    assert "a bug" in bug.getMessage() and bug.exc_info
