"""The page at `/`, in a real Chromium, against the real daemon with two workers."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from browser import Browser, Page
from daemon import Daemon
from programs import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def daemon(browser: Browser) -> Iterator[Daemon]:
    heartbeat = {"BCAST_HEARTBEAT_INTERVAL": "1s", "BCAST_HEARTBEAT_TIMEOUT": "5s"}
    with Daemon(workers=2, redis="embedded:", **heartbeat) as daemon:
        yield daemon


def post(daemon: Daemon, body: dict[str, Any]) -> None:
    request = urllib.request.Request(f"{daemon.url}/broadcast", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


@pytest.fixture
def page(browser: Browser, daemon: Daemon) -> Iterator[Page]:
    page = opened(browser, daemon)
    yield page
    assert page.errors == []
    # Nothing but this server, and of that nothing but the page and its socket.
    hosts = {url.split("://")[1] for url in page.requests if not url.startswith("data:")}
    host = daemon.url.removeprefix("http://")
    assert hosts == {f"{host}/", f"{host}/ws"}
    page.command("Page.close")


def opened(browser: Browser, daemon: Daemon) -> Page:
    page = browser.open(f"{daemon.url}/")
    page.wait_for("document.documentElement.dataset.state === 'open'")
    return page


def subscribe(page: Page, channel: str, state: str = "on") -> None:
    page.click("#channel")
    page.type(channel)
    page.press("Enter")
    page.wait_for(f"document.querySelector('#channels li:last-child').className === {json.dumps(state)}")


def publish(page: Page, channel: str, data: str) -> None:
    for selector, text in (("#to", channel), ("#data", data)):
        page.click(selector)
        page.evaluate("document.activeElement.select()")
        page.type(text)
    page.click("#send")


def rows(page: Page, kind: str, way: str = "in") -> list[str]:
    """What the rows of this type say."""
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('#rows .k-{kind}.{way} .text')].map((e) => e.textContent)"
    )
    return found


def wait_for_rows(page: Page, kind: str, count: int, way: str = "in") -> list[str]:
    page.wait_for(f"document.querySelectorAll('#rows .k-{kind}.{way}').length >= {count}")
    return rows(page, kind, way)


def test_what_is_posted_or_published_arrives_in_the_pages(
    page: Page, browser: Browser, daemon: Daemon
) -> None:
    other = opened(browser, daemon)
    assert page.text("#status") == "Connected"
    assert page.text("#identity").startswith("as ")
    assert page.text("#identity") != other.text("#identity")
    subscribe(page, "news")
    subscribe(other, "news")

    post(daemon, {"channel": "news", "data": {"from": "curl"}})
    for each in (page, other):
        assert wait_for_rows(each, "message", 1) == ['news{"from":"curl"}']

    publish(page, "news", '{"from": "a page", "n": [1, 2.5, null]}')
    assert wait_for_rows(other, "message", 2)[1] == 'news{"from":"a page","n":[1,2.5,null]}'
    page.wait_for("document.querySelector('#publish-said').textContent === 'Taken.'")
    assert len(rows(page, "broadcast", "out")) == 1

    page.click("#as-text")
    publish(page, "news", 'not {"json')
    assert wait_for_rows(other, "message", 3)[2] == r'news"not {\"json"'
    page.wait_for("document.querySelector('#channels .count').textContent === '3'")

    page.click("#channels button")
    page.wait_for("!document.querySelector('#channels li')")
    wait_for_rows(page, "ack", 5)
    post(daemon, {"channel": "news", "data": "late"})
    wait_for_rows(other, "message", 4)
    assert len(rows(page, "message")) == 3
    assert other.errors == []
    other.command("Page.close")


def test_a_row_opens_to_the_whole_frame_by_keyboard(page: Page, daemon: Daemon) -> None:
    subscribe(page, "news")
    post(daemon, {"channel": "news", "data": {"a": 'x"y', "b": True}, "messageId": "m-1"})
    wait_for_rows(page, "message", 1)
    page.evaluate("document.querySelector('#rows .k-message summary').focus()")
    page.press("Enter")
    page.wait_for("document.querySelector('#rows .k-message pre')")
    frame = json.loads(page.text("#rows .k-message pre"))
    assert (frame["type"], frame["messageId"], frame["data"]) == ("message", "m-1", {"a": 'x"y', "b": True})


def test_errors_are_shown_as_the_sentence_that_they_carry(page: Page) -> None:
    subscribe(page, "$server", "bad")
    (row,) = wait_for_rows(page, "error", 1)
    sentence = row.removeprefix("$server").removesuffix(" (bad_channel)")
    assert page.text("#subscribe-said") == f"$server: {sentence}"
    page.click("#to-all")
    page.click("#send")
    wait_for_rows(page, "error", 2)
    assert page.text("#publish-said") in rows(page, "error")[1]
    assert "no JSON" not in page.text("#publish-said")
    page.click("#to-all")
    publish(page, "news", "{nonsense")
    assert "This is no JSON" in page.text("#publish-said")
    assert page.evaluate("document.querySelector('#data').getAttribute('aria-invalid')") == "true"
    publish(page, "", "1")
    assert page.text("#publish-said") == "Name a channel."


def test_what_is_received_is_text_and_never_html(page: Page, daemon: Daemon) -> None:
    subscribe(page, "~news~")
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    post(daemon, {"channel": "~news~", "data": {attack: attack}})
    wait_for_rows(page, "message", 1)
    page.click("#rows .k-message summary")
    page.wait_for("document.querySelector('#rows pre')")
    assert attack in json.loads(page.text("#rows pre"))["data"]
    assert page.evaluate("document.querySelectorAll('#rows img, #rows script').length") == 0
    assert page.evaluate("document.title") == "tornado-bcast"


def test_the_log_is_bounded_and_can_be_filtered_and_cleared(page: Page, daemon: Daemon) -> None:
    subscribe(page, "flood")
    post(daemon, {"messages": [{"channel": "flood", "data": n} for n in range(700)]})
    page.wait_for("document.querySelector('#channels .count').textContent === '700'")
    # A heartbeat may stand after it.
    page.wait_for(
        "[...document.querySelectorAll('#rows .k-message .text')].at(-1).textContent.endsWith('699')"
    )
    count = page.evaluate("document.querySelectorAll('#rows li').length")
    assert 490 <= count <= 500
    end = "document.querySelector('#rows').scrollTop + document.querySelector('#rows').clientHeight"
    page.wait_for(f"{end} > document.querySelector('#rows').scrollHeight - 5")  # it follows
    page.resize(390, 844)
    page.wait_for(f"{end} > document.querySelector('#rows').scrollHeight - 5")
    page.resize(1280, 800)
    page.wait_for(f"{end} > document.querySelector('#rows').scrollHeight - 5")
    page.evaluate("document.querySelector('#rows').scrollTop = 0")
    page.wait_for("document.querySelector('#newer').hidden")
    post(daemon, {"channel": "flood", "data": "behind"})
    page.wait_for("document.querySelector('#newer').textContent === '↓ 1 newer'")
    page.click("#newer")
    page.wait_for(f"{end} > document.querySelector('#rows').scrollHeight - 5")
    page.click("#filter")
    page.type("BEHIND")
    shown = "[...document.querySelectorAll('#rows li')].filter((e) => e.offsetHeight).length"
    page.wait_for(f"{shown} === 1")
    page.click("#clear")
    page.wait_for("document.querySelectorAll('#rows li').length <= 2")


def test_heartbeats_are_answered_and_hidden_until_asked_for(page: Page) -> None:
    wait_for_rows(page, "ping", 1)
    wait_for_rows(page, "pong", 1, "out")
    visible = "[...document.querySelectorAll('#rows .beat')].some((e) => e.offsetHeight)"
    assert page.evaluate(visible) is False
    page.click("#beats")
    page.wait_for(visible)
    assert int(page.text("#beat-count")) >= 2


def test_it_connects_again_and_takes_its_subscriptions_along(page: Page, daemon: Daemon) -> None:
    subscribe(page, "a")
    subscribe(page, "b")
    before = page.text("#identity")
    daemon.signal(signal.SIGHUP)  # replaces the workers, one after the other
    daemon.wait_for_log("replaced", seconds=60)
    page.wait_for("document.documentElement.dataset.state === 'open'", 30)
    page.wait_for("document.querySelectorAll('#channels li.on').length === 2", 30)
    assert page.text("#identity") != before
    closings = page.evaluate(
        "[...document.querySelectorAll('#rows .k-closed .text')].map((e) => e.textContent)"
    )
    assert "The server closed the connection: restart (1012)." in closings
    post(daemon, {"channels": ["a", "b"], "data": "again"})
    assert sorted(wait_for_rows(page, "message", 2)) == ['a"again"', 'b"again"']


def test_disconnecting_stays_so_until_told_otherwise(page: Page) -> None:
    subscribe(page, "kept")
    page.click("#connect")
    page.wait_for("document.documentElement.dataset.state === 'closed'")
    assert page.evaluate("document.querySelector('#send').disabled")
    assert page.evaluate("document.querySelector('#channels li').className") == "off"
    page.click("#connect")
    page.wait_for("document.querySelector('#channels li').className === 'on'")
    page.command("Page.reload")
    page.wait_for("document.querySelector('#channels li')?.className === 'on'")


def give_token(page: Page, token: str) -> None:
    page.click("#token")
    page.evaluate("document.activeElement.select()")
    page.type(token)
    page.press("Enter")


def test_a_token_opens_what_it_allows_and_stays_in_the_page(browser: Browser, tmp_path: Path) -> None:
    secret = "the-secret-of-the-page-0123456789abcdef"
    claims = {"sub": "ann", "exp": time.time() + 600, "subscribe": ["room.*"], "publish": ["room.*"]}
    good, old = jwt.encode(claims, secret), jwt.encode({**claims, "exp": 1}, secret)
    with Daemon(f"[auth]\njwt_secret = {secret}\n") as daemon:
        page = opened(browser, daemon)
        subscribe(page, "room.1", "bad")
        assert "token" in page.text("#subscribe-said")

        give_token(page, good)
        page.wait_for("document.querySelector('#channels li').className === 'on'")
        assert ", token until " in page.text("#identity")
        publish(page, "room.1", '"hi"')
        assert wait_for_rows(page, "message", 1) == ['room.1"hi"']
        assert page.text("#subscribe-said") == ""
        page.resize(1280, 800)
        page.screenshot(tmp_path / "token.png")

        give_token(page, old)
        page.wait_for("document.documentElement.dataset.state === 'refused'")
        page.wait_for("document.querySelector('#rows .k-closed.bad')")
        told = page.text("#rows .k-closed.bad .text")
        assert told == "The server closed the connection: bad token (4500). The token has expired."
        give_token(page, "no token, surely")
        page.wait_for("document.querySelector('#status').textContent === 'This is no token'")
        assert page.evaluate("document.querySelector('#token').ariaInvalid") == "true"
        give_token(page, good)
        page.wait_for("document.documentElement.dataset.state === 'open'")

        kept = page.evaluate(
            "[location.href, document.cookie, JSON.stringify({...localStorage}),"
            " JSON.stringify({...sessionStorage}), document.body.textContent].join(' ')"
        )
        for part in good.split(".")[1:]:
            assert part not in kept
            assert not [url for url in page.requests if part in url]
        page.command("Page.reload")
        page.wait_for("document.querySelector('#token')?.value === ''")
        assert page.errors == []
        page.command("Page.close")


def test_the_curl_line_does_what_the_form_does(page: Page, tmp_path: Path) -> None:
    subscribe(page, "shell")
    page.click("#as-text")
    publish(page, "shell", 'it\'s "quoted" $HOME `x`')
    line = page.text("#curl")
    assert os.system(f"{line} > {tmp_path}/out 2>&1") == 0
    assert json.loads((tmp_path / "out").read_text().splitlines()[-1])["results"][0]["channel"] == "shell"
    first, second = wait_for_rows(page, "message", 2)
    assert first == second


def test_everything_works_with_the_keyboard(page: Page) -> None:
    page.evaluate("document.body.focus()")
    stops: list[Any] = []
    for _ in range(25):
        page.press("Tab")
        stops.append(page.evaluate("document.activeElement.id"))
    wanted = [
        "token",
        "connect",
        "channel",
        "to-all",
        "to",
        "as-json",
        "data",
        "send",
        "copy",
        "filter",
        "beats",
        "clear",
    ]
    assert [stop for stop in stops if stop in wanted][: len(wanted)] == wanted
    page.evaluate("document.querySelector('#data').focus()")
    page.press("Enter", ctrl=True)
    page.wait_for("document.querySelector('#publish-said').textContent === 'Taken.'")


def test_every_control_has_a_name(page: Page) -> None:
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button, [tabindex]')].filter((e) =>"
        " !e.labels?.length && !e.ariaLabel && !e.getAttribute('aria-labelledby')"
        " && !e.textContent.trim() && !e.hidden).map((e) => e.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (320, 568)])
def test_it_fits_and_can_be_read(
    page: Page, daemon: Daemon, width: int, height: int, dark: bool, tmp_path: Path
) -> None:
    page.resize(width, height, dark=dark)
    subscribe(page, "a.rather:long@channel-name/" + "x" * 200)
    subscribe(page, "$x", "bad")
    post(daemon, {"channel": "a.rather:long@channel-name/" + "x" * 200, "data": "y" * 5000})
    wait_for_rows(page, "message", 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # WCAG 2.2, 1.4.3: text has a contrast of 4.5 to what is behind it.
    assert page.evaluate(CONTRAST) == []
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


CONTRAST = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetHeight || e.disabled || ['SCRIPT', 'STYLE'].includes(e.tagName)) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([e.tagName, e.className, ratio, e.textContent.slice(0, 30)]);
  }
  return poor;
})()"""


def test_without_chromium_it_skips_loudly_but_fails_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="NOT tested"):
        chromium()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="NOT tested"):
        chromium()
