"""What a key may do at an address of the API; who logged in may do everything.

Every endpoint of the API names its scope with `needs`, and the schema tells it. tests/web/test_access.py asks
each of them with a key that has none.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from starlette.exceptions import HTTPException

from lifelogger.api_keys import Key
from lifelogger.web.users import Text

bearer = HTTPBearer(
    scheme_name="key",
    description="An API key (`lifelogger api-key add`) with the scopes named, or the login token.",
    auto_error=False,  # the guard has judged it; a session needs none
)


def key_of(request: Request) -> Key | None:
    """The key that the request came with; None: somebody who is logged in."""
    key: Key | None = getattr(request.state, "key", None)
    return key


def check(
    request: Request,
    wanted: SecurityScopes,
    shown: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> None:
    """Refuse a key that has not the scopes, or is for another user than the one in the address."""
    key = key_of(request)
    if key is None:
        return
    missing = [scope for scope in wanted.scopes if scope not in key.scopes]
    if missing:
        raise HTTPException(403, f"This key has not the scope {missing[0]}.")
    if key.user_id is not None and request.path_params.get("user_id", key.user_id) != key.user_id:
        raise HTTPException(403, "This key is for another user.")


def needs(scope: str) -> Any:
    """The scope that an endpoint asks of a key, as one of its `dependencies`."""
    return Security(check, scopes=[scope])


def needs_too(request: Request, scope: str) -> None:
    """Refuse a key without the scope that a part of an answer asks for, besides the endpoint's own."""
    key = key_of(request)
    if key is not None and scope not in key.scopes:
        raise HTTPException(403, f"This key has not the scope {scope}.")


def of_everybody(request: Request) -> None:
    """Refuse a key that is for one user: this tells about all."""
    key = key_of(request)
    if key is not None and key.user_id is not None:
        raise HTTPException(403, "This key is for one user, and this address tells about all.")


def one_or_all(request: Request, user: Text | None = None) -> str | None:
    """The user asked about; None: all. A key for one user asks about nobody else."""
    key = key_of(request)
    if key is None or key.user_id is None:
        return user
    if user not in (None, key.user_id):
        raise HTTPException(403, "This key is for another user.")
    return key.user_id


EVERYBODY = Depends(of_everybody)
OneOrAll = Annotated[str | None, Depends(one_or_all)]
