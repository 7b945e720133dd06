"""The status pages, the API and the dashboard, behind one login. Start with `lifelogger.web.app`."""
