"""An error with a sentence of its own stands in Prefect's log as that sentence, without a traceback.

Prefect's engine logs each exception with its stack. Ours (deployments.errors) say what was found, what was expected and
the fix; the stack above them is our inside. Any other error keeps it: that one is a bug.
"""

from __future__ import annotations

import logging

from deployments.errors import StepError

LOGGERS = ("prefect.flow_runs", "prefect.task_runs")  # of Prefect's flow engine and task engine


def plain_errors() -> None:
    """Make it so in this process; again changes nothing."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Plain) for f in logger.filters):
            logger.addFilter(_Plain())


class _Plain(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Every record stays."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, StepError):
            record.msg, record.args = str(error), ()
            record.exc_info, record.exc_text = None, None
        return True
