"""Keeping a job alive: what to do when ranks or machines fail, hang, leave or come back.

Decisions are pure functions of what has happened (`machine`, `budget`, `sizing`); `supervisor` lets things happen.
"""
