"""The map of this code: what stands where, drawn from declarations and from a run that was watched. Observation path.

`stops` declares what is on the map, `watch` runs a small simulation and notes who called what, `answers` and
`picture` show it, `walk` follows one request. `python -m lab.tour` is the command.
"""
