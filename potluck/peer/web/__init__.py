"""The pages: a run, its contributors, one peer, and this machine, as a small web application and a JSON API.

It reads what others wrote (`peer/history.py`, copies of ledgers) and needs neither torch nor hivemind: it lives in the
daemon's own process, or in a monitor's.

    app = create_app(home.runs, machine=machine, token=token)      # app.py
    async with serve(app, "127.0.0.1", 7770) as url:               # serve.py
        ...
"""
