"""A back end that shows people their runs: it reads through the library, a worker beside it keeps them fresh.

How to run it: examples/README.md.
"""

import hmac
import os
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBasic, HTTPBasicCredentials, HTTPBearer

from lifelogger import client
from lifelogger.web import connect

app = FastAPI(title="Runs of the week")


def person(user_id: str, login: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    """Who asks. Put your own login here, which shows people only themselves; this has one secret for all."""
    if not hmac.compare_digest(login.credentials.encode(), os.environ["BACKEND_TOKEN"].encode()):
        raise HTTPException(403, "That is not the token in BACKEND_TOKEN.")
    return user_id


Person = Annotated[str, Depends(person)]


def signed_in(login: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> str:
    """Who uses this browser. Put your own session here; this asks for a name, and the same secret."""
    if not hmac.compare_digest(login.password.encode(), os.environ["BACKEND_TOKEN"].encode()):
        raise HTTPException(401, "Who are you?", {"WWW-Authenticate": "Basic"})
    return login.username


# Connecting an account, in one line: a link to /accounts/PROVIDER sends whoever is signed in to the provider.
app.include_router(connect.router(user=signed_in), prefix="/accounts")


@app.get("/users/{user_id}/runs-of-the-week")
def runs_of_the_week(user_id: Person) -> list[dict[str, Any]]:
    """What the database holds now: no provider is asked, so it answers at once."""
    found = client.records(user_id, kind="activity", since=datetime.now(UTC) - timedelta(days=7), limit=1000)
    wanted = ("start_at", "title", "distance_m", "moving_s")
    return [{key: each[key] for key in wanted} for each in found if each["type"] == "running"]


@app.post("/users/{user_id}/sync", status_code=202)
def sync(user_id: Person) -> dict[str, Any]:
    """Ask the workers to look now; they do it within a second, as far as the provider's budget goes."""
    wish = client.sync_now(user_id)
    return {"connections": wish.connections, "at": wish.at, "runs": wish.runs}
