"""Leaving by a button or by the API: what is gone, and the receipt that stays."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from lifelogger import status
from lifelogger.runtime import Runtime
from tests.web.people import connect, recorded
from tests.web.test_pages import text


@pytest.fixture
def ann(runtime: Runtime) -> None:
    """Ann, connected to a provider that nobody answers for, with two records."""
    connection = connect(runtime, "ann")
    recorded(runtime, connection, "1")
    recorded(runtime, connection, "2")


def test_a_button_ends_a_connection_after_a_question(client: TestClient, runtime: Runtime, ann: None) -> None:
    assert 'href="/users/ann/leave"' in client.get("/users/ann").text
    page = client.get("/users/ann/leave").text
    assert 'href="/api/users/ann/export"' in page
    assert 'href="/api/users/ann/export"' in client.get("/users/ann").text
    assert "Disconnect Strava Deletes 2 records for good, and revokes the authorisation there." in text(page)
    assert "http-equiv" not in page

    reply = client.post("/users/ann/connections/strava/disconnect")

    assert reply.status_code == 303
    said = text(client.get(reply.headers["location"]).text)
    assert "Disconnected at" in said
    assert "records 2 deleted" in said
    assert "Its authorisation is revoked as soon as the provider answers." in said
    assert "ann" not in said.replace("cannot", "")
    assert "Each account that this user connects will appear here" in client.get("/users/ann").text


def test_a_button_erases_a_user_after_a_question(client: TestClient, runtime: Runtime, ann: None) -> None:
    assert "Deletes everything of 1 connection for good" in text(client.get("/users/ann/leave").text)

    reply = client.post("/users/ann/erase")

    assert "Erased at" in text(client.get(reply.headers["location"]).text)
    assert client.get("/users/ann").status_code == 404
    assert status.users(runtime) == []


def test_a_program_ends_a_connection(client: TestClient, runtime: Runtime, ann: None) -> None:
    said = client.delete("/api/users/ann/connections/strava").json()

    assert (said["kind"], said["connections"][0]["deleted"]["records"]) == ("disconnected", 2)
    assert client.get(f"/api/receipts/{said['receipt']}").json() == said
    assert client.get("/api/users/ann").json()["connections"] == []
    assert client.delete("/api/users/ann/connections/strava").status_code == 404
    assert client.delete("/api/users/zoe/connections/strava").status_code == 404


def test_a_program_erases_a_user(client: TestClient, runtime: Runtime, ann: None) -> None:
    said = client.delete("/api/users/ann").json()

    assert (said["kind"], said["connections"][0]["revocation"]) == ("erased", "pending")
    assert client.get("/api/users/ann").status_code == 404
    assert client.delete("/api/users/ann").status_code == 404
    assert client.get("/api/receipts/unknown").json() == {"detail": "There is no such receipt."}


def test_a_user_without_a_connection_gets_a_receipt_too(client: TestClient, runtime: Runtime) -> None:
    connect(runtime, "ann")
    client.delete("/api/users/ann/connections/strava")

    said = client.delete("/api/users/ann").json()

    assert (said["kind"], said["connections"]) == ("erased", [])
    assert "There was no connection." in client.get(f"/receipts/{said['receipt']}").text
