"""The form of an agent that is shown pictures: a URL is enough, and an object will do."""

from typing import Any

import dspy
import pytest
from playwright.async_api import Browser

from agentcast.agents.base import Emitter
from agentcast.agents.registry import Registry
from tests.browser.test_page import open_page
from tests.support.hub import open_hub

URL = "https://example.org/a.png"
registry = Registry()


@registry.agent
async def viewer(photo: dspy.Image, other: dspy.Image | None, emit: Emitter) -> str:
    """Looks."""
    return f"{photo.url} {other and other.url}"


@pytest.mark.parametrize("text", [URL, f'{{"url": "{URL}"}}', f'"{URL}"'])
async def test_picture_is_given_by_its_url(browser: Browser, text: str) -> None:
    agent: Any = registry["viewer"]
    async with open_hub(agent) as hub, open_page(browser, hub) as page:
        assert await page.locator("#field-photo-help").text_content() == "Text or JSON"
        await page.fill("#field-photo", text)
        await page.fill("#field-other", text)
        await page.click('[data-action="start"]')
        await page.get_by_text(f"{URL} {URL}").first.wait_for()
