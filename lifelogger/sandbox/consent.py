"""The page on which a person lets an application in, for any simulated provider (OAuth 2, code grant).

Nobody signs in here: whoever looks at it picks the person they want to be. With `person=` in the query
it decides at once, so that tests need no browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from urllib.parse import urlencode, urlsplit

from lifelogger.sandbox.calls import Call, Mistake, Reply
from lifelogger.sandbox.grants import Code, Grants
from lifelogger.sandbox.people import People

CODE_SECONDS = 600
DECISIONS = ("person", "grant", "deny")
"""Parameters of the query that are the person's, not the application's."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Sandbox {title}: who are you?</title>
<link rel="icon" href="data:,">
<style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem}}
fieldset{{border:1px solid #8888;border-radius:.5rem;margin:1.25rem 0;padding:.6rem 1rem .8rem;min-width:0}}
.scope{{display:flex;gap:.5rem;align-items:baseline;overflow-wrap:anywhere}}
.people{{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.5rem}}
button{{font:inherit;text-align:left;padding:.4rem .8rem;border:1px solid #8888;border-radius:.5rem}}
button{{cursor:pointer}}
small{{display:block;opacity:.7}}
</style>
<h1>Sandbox {title}</h1>
<p>The application <b>{client}</b> asks to see a person's data. Nobody here is real: pick who you are.</p>
<form method="get">{hidden}
<fieldset><legend>It may see</legend>
{scopes}
</fieldset>
<fieldset><legend>Agree as</legend>
<div class="people">
{people}
</div>
</fieldset>
</form>
<p><a href="?{deny}">Deny</a></p>
</html>
"""


class Consent:
    """How one provider asks: its title, what it can grant, and what stands between scopes."""

    def __init__(
        self, grants: Grants, people: People, title: str, scopes: Sequence[str], separator: str
    ) -> None:
        self.grants = grants
        self.people = people
        self.title = title
        self.scopes = scopes
        self.separator = separator

    def answer(self, call: Call) -> Reply:
        """The page, or the redirect that a decision leads to. Raises `Mistake` on a bad request."""
        client, uri = call.asked("client_id"), call.asked("redirect_uri")
        if not client:
            raise Mistake("client_id")
        if not uri or urlsplit(uri).scheme not in ("http", "https") or not urlsplit(uri).netloc:
            raise Mistake("redirect_uri")
        if call.asked("response_type") != "code":
            raise Mistake("response_type")
        scopes = tuple(filter(None, (call.asked("scope") or "").split(self.separator)))
        if not scopes or any(scope not in self.scopes for scope in scopes):
            raise Mistake("scope")
        state = call.asked("state")
        back = {} if state is None else {"state": state}
        if call.asked("deny") is not None:
            return redirect(uri, {**back, "error": "access_denied"})
        word = call.asked("person")
        if word is None:
            return self._page(call, client, scopes)
        person = self.people.by_id.get(word)
        if person is None:
            raise Mistake("person")
        if "grant" in call.query:
            granted = {scope for text in call.query["grant"] for scope in text.split(self.separator)}
            scopes = tuple(scope for scope in scopes if scope in granted)
        if not scopes:
            return redirect(uri, {**back, "error": "access_denied"})
        code = self.grants.write_code(Code(client, person.user_id, scopes), uri, call.now + CODE_SECONDS)
        return redirect(uri, {**back, "code": code, "scope": self.separator.join(scopes)})

    def _page(self, call: Call, client: str, scopes: Sequence[str]) -> Reply:
        asked = {name: values[0] for name, values in call.query.items() if name not in DECISIONS}
        # An empty grant beside the boxes tells a form with no box ticked from no form at all.
        hidden = "".join(
            f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">'
            for name, value in {**asked, "grant": ""}.items()
        )
        boxes = "\n".join(
            f'<label class="scope"><input type="checkbox" name="grant" value="{escape(scope)}" checked> '
            f"{escape(scope)}</label>"
            for scope in scopes
        )
        people = "\n".join(
            f'<button name="person" value="{person.user_id}">{escape(person.name)} '
            f"<small>{person.timezone}</small></button>"
            for person in self.people.all
        )
        page = PAGE.format(
            title=escape(self.title),
            client=escape(client),
            hidden=hidden,
            scopes=boxes,
            people=people,
            deny=escape(urlencode({**asked, "deny": "1"})),
        )
        return Reply(200, page.encode(), content_type="text/html; charset=utf-8")


def redirect(uri: str, params: dict[str, str]) -> Reply:
    query = urlencode(params, safe=",:")
    return Reply(302, headers={"Location": f"{uri}{'&' if urlsplit(uri).query else '?'}{query}"})
