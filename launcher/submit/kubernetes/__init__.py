"""A run as a RayJob of KubeRay: derived from the config onto a template, applied, followed, replaced, deleted.

`names`, `sizes`, `template`, `rayjob` and `rules` make the object, and `state` says what a cluster has made of it, all
without a cluster; `cluster` is the only place that talks to one, and `submission` and `following` use it.
"""
