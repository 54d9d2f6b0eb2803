"""The page of the server in a real browser: Debian's chromium, driven by Playwright; skipped with a reason where one of them is missing."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements-test.txt")
pytest.importorskip("uvicorn")

from tests.cli.test_serve import client, png, server, service  # noqa: E402, F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.compiles,
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser, server):  # noqa: F811
    """A new page, which asks no other host and logs no fault."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    addresses, faults = [], []
    opened.on("request", lambda request: addresses.append(request.url))
    opened.on(
        "console",
        lambda message: (
            faults.append(message.text) if message.type == "error" and "status of 4" not in message.text else None
        ),
    )
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(server.address)
    opened.wait_for_selector("#examples button:nth-child(3)")
    yield opened
    assert not faults
    assert all(address.startswith((server.address, "blob:")) for address in addresses)
    context.close()


def upload(page, data, name="a.png"):
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def type_names(page, *names):
    for name in names:
        page.fill("#phrase", name)
        page.press("#phrase", "Enter")


def lower(page, score=0.05):
    page.evaluate(
        "s => { const t = document.getElementById('threshold'); t.value = s; t.dispatchEvent(new Event('input')); }",
        score,
    )


def shot(page, selector):
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)


def test_boxes_lie_where_the_json_says_and_the_slider_asks_nothing(page):
    with page.expect_response("**/detect") as answered:
        upload(page, png(1, 48, 64))
        type_names(page, "cat", "dog")
    answer = answered.value.json()
    assert answer["phrases"] == ["cat", "dog"] and len(answer["detections"]) == 6
    sync_api.expect(page.locator("#status")).to_contain_text("boxes")
    # The tiny network is sure of nothing: at 0.3 nothing is found, and that is said.
    assert page.locator(".box").count() == 0
    assert "Not found: cat, dog" in page.text_content("#status") and "cat: not found (best 0." in page.text_content(
        "#chips"
    )
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    lower(page)
    assert page.locator(".box").count() == 6 and not asked
    image = page.locator("#picture").bounding_box()
    scale = image["width"] / 64
    assert image["height"] == pytest.approx(48 * scale, abs=1)
    shown = sorted(
        [round((box[side] - image[side]) / scale, 1) for side in ("x", "y")]
        + [round(box[side] / scale, 1) for side in ("width", "height")]
        for box in (each.bounding_box() for each in page.locator(".box").all())
    )
    expected = sorted([x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (found["box"] for found in answer["detections"]))
    np.testing.assert_allclose(shown, expected, atol=0.15)
    # Pixels of one box alone: what changes when it is drawn lies on its border, and reaches it on all sides.
    page.evaluate(
        "[...document.querySelectorAll('.box')].slice(0, -1).forEach((box) => box.remove()); document.querySelector('.box span').remove()"
    )
    with_box = shot(page, "#view")
    left, top = (page.locator(".box").bounding_box()[side] - image[side] for side in ("x", "y"))
    width, height = (page.locator(".box").bounding_box()[side] for side in ("width", "height"))
    page.evaluate("document.querySelector('.box').remove()")
    rows, columns = np.nonzero(np.abs(with_box - shot(page, "#view")).max(2) > 30)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx(
        [left, top, left + width, top + height], abs=2
    )
    inner = (columns > left + 4) & (columns < left + width - 4) & (rows > top + 4) & (rows < top + height - 4)
    assert not inner.any()


def test_hover_chips_keys_and_downloads(page):
    upload(page, png(2), "photo.png")
    type_names(page, "cat")
    page.fill("#phrase", "dog, red car")  # a comma adds as well
    page.press("#phrase", "Enter")
    lower(page)
    page.wait_for_selector(".box")
    chips = page.locator("#chips li")
    assert chips.count() == 3
    first = page.locator(".box").first.get_attribute("data-phrase")
    own = page.locator(f'.box[data-phrase="{first}"]').count()
    page.hover(f'#chips li[data-phrase="{first}"] .name')
    assert page.locator(".box.lit").count() == own and page.locator(".box.dim").count() == 6 - own
    page.locator(".box").first.focus()
    assert page.locator(".box.lit").count() == 1 and page.locator(f'#chips li[data-phrase="{first}"].lit').count() == 1
    with page.expect_download() as saved:
        page.click("#save_json")
    content = json.loads(saved.value.path().read_text())
    assert (
        saved.value.suggested_filename == "photo.json"
        and len(content["detections"]) == 6
        and content["checkpoint"]["name"] == "tiny"
    )
    with page.expect_download() as saved:
        page.click("#save_picture")
    assert Image.open(saved.value.path()).size == (64, 64)
    page.focus("#phrase")
    page.keyboard.press("Backspace")
    assert chips.count() == 2
    page.keyboard.press("Shift+Tab")  # nothing traps the focus
    page.locator("#chips .remove").first.press("Enter")
    assert chips.count() == 1 and "dog" in chips.text_content()


def test_an_image_is_dropped_pasted_or_taken_from_the_examples(page):
    hand_in = """([data, kind]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(data)], `${kind}.png`, { type: "image/png" }));
      document.dispatchEvent(kind === "drop" ? new DragEvent(kind, { dataTransfer: transfer, cancelable: true })
        : new ClipboardEvent(kind, { clipboardData: transfer }));
    }"""
    type_names(page, "cat")
    for kind, seed in (("drop", 6), ("paste", 7)):
        with page.expect_response("**/detect") as answered:
            page.evaluate(hand_in, [list(png(seed)), kind])
        sync_api.expect(page.locator("#picture")).to_have_attribute("alt", f"{kind}.png")
        assert answered.value.status == 200 and answered.value.json()["phrases"] == ["cat"]
    with page.expect_response("**/detect") as answered:
        page.click("#examples button")
    assert answered.value.json()["phrases"] == ["owl", "grapes", "bowling pins", "snail"]
    sync_api.expect(page.locator("#chips li")).to_have_count(4)


def test_errors_are_shown_and_go_away(page):
    type_names(page, "cat")
    upload(page, b"no image at all")
    page.wait_for_selector("#error:not([hidden])")
    assert "a.png cannot be shown: it is no image" in page.text_content("#error") and not page.is_visible("#view")
    upload(page, png(3))
    type_names(page, *(f"thing {number}" for number in range(8)))
    page.wait_for_selector("#error:not([hidden])")
    assert (
        "9 names: expected at most 8" in page.text_content("#error") and page.get_attribute("#error", "role") == "alert"
    )
    page.locator("#chips .remove").last.click()
    sync_api.expect(page.locator("#status")).to_contain_text("box")
    assert not page.is_visible("#error")
    page.set_viewport_size({"width": 340, "height": 700})
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"


def test_two_pages_at_once_get_their_own_boxes(browser, page, client):  # noqa: F811
    other = browser.new_context().new_page()
    other.goto(page.url)
    for each, seed, name in ((page, 4, "cat"), (other, 5, "dog")):
        upload(each, png(seed))
        type_names(each, name)
    for each, seed, name in ((page, 4, "cat"), (other, 5, "dog")):
        sync_api.expect(each.locator("#status")).to_contain_text("boxes")
        lower(each)
        shown = sorted(float(box.get_attribute("data-score")) for box in each.locator(".box").all())
        expected = client.post("/detect", files={"image": png(seed)}, data={"names": name, "threshold": "0.05"}).json()[
            "detections"
        ]
        assert shown == pytest.approx(sorted(found["score"] for found in expected), abs=2e-4) and shown
    other.context.close()


def test_the_page_asks_for_the_token_where_there_is_one(browser, server, service):  # noqa: F811
    from tests.cli.test_serve import Running, service_without_thread

    with ThreadPoolExecutor(1) as pool:  # playwright's loop runs in this thread
        guarded = pool.submit(Running, service_without_thread(service), token="a-long-enough-token").result()
        opened = browser.new_context().new_page()
        opened.goto(guarded.address)
        opened.click("#examples button")
        opened.wait_for_selector("#access:not([hidden])")
        opened.fill("#token", "a-long-enough-token")
        opened.press("#token", "Enter")
        sync_api.expect(opened.locator("#status")).to_contain_text("box")
        opened.context.close()
        pool.submit(guarded.stop).result()
