"""Workloads: what arrives, when, and how long it is. Request path; feeds both planes the same requests.

    from traces.registry import build
    workload = build("chat", {"limit": 48})        # names and options: `traces.registry.TRACES`

A loader turns a file, or a few named random streams, into a `traces.workload.Workload` of
`lab.control.request.Request`s. Nothing here knows of engines, policies or clocks; formats and the places
to download public traces are in README.md beside this file.
"""
