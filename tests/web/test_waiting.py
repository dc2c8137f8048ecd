"""The queue in the top line: who waits for the device."""

import json
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.web.driving import SCREENSHOTS, start

pytestmark = pytest.mark.browser

GET_QUEUE = "**/tdb.inference.v1.InferenceService/GetQueue"


def queue_of(*entries: dict[str, Any]) -> Any:
    """Answers GetQueue with these."""
    body = json.dumps({"entries": list(entries)})
    return lambda route: route.fulfill(status=200, content_type="application/json", body=body)


def test_an_idle_device_is_said_to_be_idle(page: Page) -> None:
    start(page)
    queue = page.locator("details.queue")
    expect(queue.locator("summary")).to_have_text("queue 0")
    queue.locator("summary").click()
    expect(queue.get_by_role("region", name="Queue")).to_contain_text("The device is idle.")


def test_who_waits_for_what(page: Page) -> None:
    page.route(
        GET_QUEUE,
        queue_of(
            {
                "user": "ada",
                "method": "tdb.inference.v1.InferenceService/Verify",
                "kind": "Verify.chunk",
                "running": True,
                "queue": {"priority": "PRIORITY_BULK"},
                "waitedMs": 320.0,
            },
            {
                "user": "bob",
                "method": "tdb.inference.v1.InferenceService/Attribute",
                "kind": "Attribute",
                "queue": {
                    "priority": "PRIORITY_INTERACTIVE",
                    "position": 1,
                    "expectedWaitMs": 2200.0,
                },
                "waitedMs": 80.0,
            },
        ),
    )
    start(page)
    queue = page.locator("details.queue")
    expect(queue.locator("summary")).to_have_text("queue 1")
    queue.locator("summary").click()
    lines = queue.locator("tr")
    expect(lines.nth(0)).to_have_text("adaVerifyruns0.3 s")
    expect(lines.nth(1)).to_have_text("bobAttribute1 request goes first, about 2 s0.1 s")
    page.screenshot(path=SCREENSHOTS / "queue.png")


def test_a_service_that_does_not_answer(page: Page) -> None:
    start(page)

    def refuse(route: Route) -> None:
        body = json.dumps({"code": "resource_exhausted", "message": "later"})
        route.fulfill(status=429, content_type="application/json", body=body)

    page.route(GET_QUEUE, refuse)
    queue = page.locator("details.queue")
    queue.locator("summary").click()
    expect(queue.locator("summary")).to_have_text("queue –")
    expect(queue).to_contain_text("The service does not answer.")
