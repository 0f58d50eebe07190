"""The demo graphs on the page: the drawing, a rejected attempt, and the result."""

from playwright.async_api import Browser, expect

from tests.browser.test_page import open_page
from tests.support.process import serve

DEMO = "agentcast.agents.demo:registry"
TICKET = "Severity: critical\n\n" + "The export fails for all users, an outage, and so on and on, " * 3 + "and on."

OVERLAPPING = """(svg) => {
    const boxes = [...svg.querySelectorAll("[data-node] rect")].map((rect) => rect.getBoundingClientRect());
    const labels = [...svg.querySelectorAll(":scope > text.label")];
    return labels.filter((label) => {
        const a = label.getBoundingClientRect(), all = svg.getBoundingClientRect();
        const hits = (b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
        return a.left < all.left || a.right > all.right || boxes.some(hits);
    }).map((label) => label.textContent);
}"""


async def test_a_rejected_attempt_is_crossed_out_and_labels_stay_clear_of_the_nodes(browser: Browser) -> None:
    async with (
        serve(agents=DEMO, offline_delay="0") as hub,
        open_page(browser, hub) as page,
        hub.client() as client,
    ):
        run = await client.start("triage", {"ticket": TICKET})
        card = page.locator(f'.card[data-run="{run}"]')
        await expect(card).to_have_attribute("data-status", "done")
        await expect(card.locator(".checks")).to_contain_text("classify: attempt 1 of 4 did not validate")
        await expect(card.locator('[data-output="summary"][data-message="retracted"]')).to_have_count(1)
        await expect(card.locator('[data-output="summary"][data-message="done"]')).to_have_count(1)
        await expect(card.locator('[data-result][data-output="severity"]')).to_contain_text("critical")
        labels = card.locator(".graph svg")
        await expect(labels.locator("text.label").first).to_be_attached()
        assert await labels.evaluate(OVERLAPPING) == []


async def test_the_form_says_what_to_give(browser: Browser) -> None:
    async with serve(agents=DEMO) as hub, open_page(browser, hub) as page:
        for name, field in (("triage", "ticket"), ("report", "topic")):
            await page.select_option("#agent", name)
            control = page.locator(f'[data-field="{field}"]')
            await expect(control).to_have_js_property("tagName", "TEXTAREA")
            assert await control.get_attribute("placeholder")
            await expect(page.locator(f"#field-{field}-help")).not_to_be_empty()
