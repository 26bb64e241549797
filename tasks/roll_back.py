"""An earlier version back in service, as a step of its own: `python -m tasks.step roll_back request.json result.json`.

On a cluster only a step's pod may change what is served. Not covered: the transaction itself (tasks.deploy_model).
"""

from __future__ import annotations

from tasks.deploy_model import Endpoint, RollbackRequest, undone_when_cancelled
from tasks.deploy_model import roll_back as move_back


def roll_back(request: RollbackRequest) -> Endpoint:
    """Raises GiveUp if there is no such version, or if it is refused and all is as before; TryAgain as deploying."""
    with undone_when_cancelled():
        return move_back(request)
