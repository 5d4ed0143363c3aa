"""What may be shown of a URL, and written down."""


def without_secrets(url: str) -> str:
    """A URL as it may be shown: without the password and the query, nor, where a web server is asked, the user.

    Before the @ there is a container in `abfs://container@account...`, and a token in `https://token@host/...`.
    """
    scheme, separator, rest = url.partition("://")
    place, slash, path = rest.partition("?")[0].partition("/")
    user, at, host = place.rpartition("@")
    if ":" in user:
        user = f"{user.partition(':')[0]}:..."
    elif at and scheme.lower() in ("http", "https"):
        user = "..."
    return f"{scheme}{separator}{user}{at}{host}{slash}{path}"


def holds_secrets(url: str) -> bool:
    """Whether there is something in it that should not be shown."""
    return without_secrets(url) != url
