"""What is known of the dictionaries, in a real browser."""

import pytest
from playwright.sync_api import Page, expect

from tests.web.driving import shoot, start

pytestmark = pytest.mark.browser


def test_the_library_tells_how_well_each_dictionary_does(page_with_latents: Page) -> None:
    page = page_with_latents
    start(page)
    page.get_by_role("button", name="8 dictionaries").click()
    library = page.get_by_role("dialog", name="Dictionaries")
    expect(library.locator("tbody tr")).to_have_count(8)
    expect(library).to_contain_text("exact-attn_out-2")
    expect(library).to_contain_text("mlp_out.3")
    shoot(page, "library")
    page.keyboard.press("Escape")
    expect(library).to_have_count(0)
