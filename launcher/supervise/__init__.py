"""Keeping a job alive: what to do when ranks or machines fail, hang, hold others up, leave or come back.

Decisions are pure functions of what has happened (`machine`, `budget`, `sizing`, `watch`, `hang`, `stragglers`);
`supervisor` lets things happen.
"""
