"""Which addresses `--to` takes."""

import pytest

from launcher.submit.ray_jobs import dashboard_url
from trainer.config import UserError


@pytest.mark.parametrize(
    ("to", "url"),
    [
        ("ray://head:10001", "http://head:8265"),
        ("ray://head", "http://head:8265"),
        ("ray://[::1]:10001", "http://[::1]:8265"),
        ("http://head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("https://gateway/ray/", "https://gateway/ray"),
    ],
)
def test_the_dashboard_of_a_cluster(to: str, url: str) -> None:
    assert dashboard_url(to) == url


@pytest.mark.parametrize("to", ["auto", "head:6379", "ray://", "http://:8265", "ray://head:port", "k8s", ""])
def test_anything_else_is_refused(to: str) -> None:
    with pytest.raises(UserError, match=r"is no address of a Ray cluster; use ray://HOST:10001 or http://HOST:8265$"):
        dashboard_url(to)
