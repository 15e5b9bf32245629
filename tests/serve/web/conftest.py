"""One Chromium a session, a stand-in server and a fresh page a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser_chromium import Chromium, Page
from browser_server import StandIn, stand_in


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def blank(chromium: Chromium) -> Iterator[Page]:
    """A page that has opened nothing yet."""
    page = chromium.page()
    yield page
    page.close()


@pytest.fixture
def page(blank: Page, server: StandIn) -> Page:
    """The page of the stand-in server, its models listed."""
    blank.open(server.url)
    blank.until("document.querySelectorAll('#model option').length")
    return blank


@pytest.fixture(scope="module")
def quiet_page(chromium: Chromium) -> Iterator[Page]:
    """One opened page for all tests of a module that leave it as it was."""
    with stand_in() as server:
        page = chromium.page()
        page.open(server.url)
        yield page
        page.close()
