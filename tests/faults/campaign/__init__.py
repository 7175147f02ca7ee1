"""The fault campaign: a random load and random faults, all drawn from one seed, in rounds.

:mod:`.schedule` draws what happens and when, a pure function of the seed; :mod:`.events` says how
each thing is done, and undone, on a :mod:`.site` (Postgres, Qdrant, proxies between, and the daemon
as users run it); :mod:`.load` makes the tables and changes them; :mod:`.rounds` has it all happen,
lets everything quiet down after each round and compares both sides; :mod:`.report` keeps the log.
"""
