"""Simulated wearable clouds in one HTTP server: the referee of the tests and the demo for newcomers.

    python -m lifelogger.sandbox --port 8790

People live seeded lives (`people`), providers show them as theirs (`strava`, `fitbit`, `oura`), every
request is counted and written down (`ledger`), and a control API (`control`) turns clocks, breaks replies
and tells the truth. It shares no code with the rest of lifelogger, so that an error made there is not made
here too.
"""
