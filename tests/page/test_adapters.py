"""The view Adapters: the registry, one adapter, aliases and uploads, against a real server."""

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from safetensors.torch import load_file, save_file

from server.access.key_spec import KeySpec
from tests.api.live import ADAPTERS, Live, running, tiny_service, wait_for
from tests.page.axe import grave
from tests.page.conftest import Visit, look_again, stop_looking
from tests.tiny import save_adapter, tiny_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, Mapping[str, str], Path]]:
    """A server with keys, adapters of which one has two versions; the keys' secrets by name; a folder of adapters."""
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    folders = root / "folders"
    folders.mkdir()
    for seed in range(3):
        save_adapter(model, folders / f"seed{seed}", seed, **LORA)
    adapters: dict[str, Path] = {
        name: save_adapter(model, root / name.replace("/", "-"), 7, **lora) for name, lora in ADAPTERS.items()
    }
    service = tiny_service(root, adapter=adapters, adapter_root=folders, max_rank=16)
    specs = [KeySpec(name="operator", scopes=["admin"]), KeySpec(name="app", scopes=["infer"])]
    secrets = {spec.name: service.keyring.store.add(spec)[1] for spec in specs}
    with running(service) as live:
        live.http.headers["authorization"] = f"Bearer {secrets['operator']}"
        yield live, secrets, folders


@pytest.fixture
def operator(visit: Visit, server: tuple[Live, Mapping[str, str], Path]) -> Page:
    """The view, with a key that may do everything."""
    return _signed_in(visit, server, "operator")


@pytest.fixture
def live(server: tuple[Live, Mapping[str, str], Path]) -> Live:
    """The server of this file in place of the shared one, whose adapters other tests count."""
    return server[0]


def _signed_in(visit: Visit, server: tuple[Live, Mapping[str, str], Path], key: str, place: str = "adapters") -> Page:
    page = visit(place)
    page.get_by_label("API key").fill(server[1][key])
    page.get_by_role("button", name="Continue").click()
    return page


def _go(page: Page, place: str) -> None:
    page.evaluate("place => { location.hash = `#/${place}`; }", place)


def _register(live: Live, name: str, *paths: str) -> None:
    for path in paths:
        assert live.http.post("/v1/adapters", json={"name": name, "path": path}).status_code == 201


def test_the_registry_and_an_adapter(operator: Page, live: Live) -> None:
    page = operator
    _register(live, "acme/legal", "seed0", "seed1")
    live.complete(model="acme/legal@2")
    look_again(page)
    page.get_by_role("link", name="acme/legal").wait_for()

    # Search and filters
    page.keyboard.press("/")
    page.keyboard.type("LEGAL acme")
    rows = page.get_by_role("row")
    expect(rows).to_have_count(2)
    expect(page.get_by_role("status")).to_have_text("1 of 4 adapters")
    page.get_by_label("Pinned").check()
    expect(page.get_by_role("status")).to_have_text("0 of 4 adapters")
    page.get_by_role("button", name="Show all").click()
    expect(rows).to_have_count(5)
    page.get_by_label("Came from").select_option("folder")
    expect(page.get_by_role("status")).to_have_text("4 adapters")
    page.get_by_role("columnheader", name="Rank").get_by_role("button").click()
    expect(rows.nth(1)).to_contain_text("green")
    page.get_by_role("link", name="green").focus()
    page.keyboard.press("ArrowDown")
    expect(rows.nth(2).get_by_role("link").first).to_be_focused()

    # Versions, the receipt, use
    page.get_by_role("link", name="acme/legal").click()
    versions = page.get_by_role("table", name="Versions of acme/legal")
    first, second = versions.get_by_role("row", name="@1"), versions.get_by_role("row", name="@2")
    expect(second).to_contain_text("active")
    receipt = page.get_by_role("region", name="Receipt of @2")
    expect(receipt).to_contain_text("this server's base")
    expect(receipt).to_contain_text("folder seed1")
    receipt.get_by_text("which", exact=True).click()
    expect(receipt).to_contain_text("README.md")
    expect(page.get_by_role("region", name="Use")).to_contain_text("1 in the last 30 days")
    first.get_by_role("button", name="Roll back").click()
    expect(first).to_contain_text("active")
    assert live.http.get("/v1/adapters/acme/legal").json()["active"] == 1
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.get_by_role("button", name="Unpin")).to_be_visible()
    first.get_by_role("button", name="@1", exact=True).click()
    expect(page.get_by_role("region", name="Receipt of @1")).to_contain_text("folder seed0")
    page.get_by_text("Two versions side by side").click()
    page.get_by_label("Only what differs").check()
    expect(page.get_by_role("row", name="Came from")).to_contain_text("folder seed1")
    expect(page.get_by_role("row", name="Proved on")).to_have_count(0)
    assert grave(page) == []
    expect(page.get_by_role("link", name="Talk to it")).to_have_attribute("href", "#/talk?adapter=acme%2Flegal")

    # Somebody else changes it while the question is open: nothing is deleted
    page.get_by_role("button", name="Delete…", exact=True).click()
    question = page.get_by_role("dialog", name="Delete acme/legal?")
    expect(question).to_contain_text("All 2 versions: @1, @2")
    assert grave(page) == []
    live.http.post("/v1/adapters/acme/legal/activate", json={"version": 2}).raise_for_status()
    question.get_by_role("button", name="Delete acme/legal").click()
    expect(page.get_by_role("alert")).to_contain_text("It is shown as it is now.")
    expect(second).to_contain_text("active")
    first.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete acme/legal@1").click()
    expect(first).to_have_count(0)
    page.get_by_role("button", name="Delete…", exact=True).click()
    stop_looking(page)
    page.get_by_role("button", name="Delete acme/legal", exact=True).click()
    expect(page.get_by_role("heading", name="Adapters")).to_be_visible()
    expect(page.get_by_role("link", name="acme/legal")).to_have_count(0)
    assert live.http.get("/v1/adapters/acme/legal").status_code == 404


def test_registering(operator: Page, live: Live, server: tuple[Live, Mapping[str, str], Path], tmp_path: Path) -> None:
    page, folder = operator, shutil.copytree(server[2] / "seed2", tmp_path / "seed2")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# The card\n\n<img src=x onerror=alert(1)>")
    log = [{"time": 1, "event": "started", "step": 0}, *({"time": step, "step": step, "loss": 2.5} for step in (1, 2))]
    (folder / "training.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    page.get_by_role("button", name="Register…").click()
    form = page.get_by_role("main")

    # A refusal with its file and tensor, as the server says it
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    tensor = sorted(weights)[0]
    weights[tensor].fill_(float("nan"))
    save_file(weights, broken / "adapter_model.safetensors")
    (broken / "optimizer.pt").write_bytes(b"x" * 100_000)
    page.get_by_label("Folder", exact=True).set_input_files(broken)
    expect(form).to_contain_text("1 other files: only their names are sent")
    expect(page.get_by_label("Name", exact=True)).to_have_value("broken")
    page.get_by_label("Name", exact=True).fill("page/new")
    page.get_by_role("button", name="Register", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text(tensor)
    expect(page.get_by_role("alert")).to_contain_text("adapter_model.safetensors")

    # Cancelling while it is sent
    (broken / "adapter_model.safetensors").write_bytes(bytes(4 << 20))
    page.get_by_label("Folder", exact=True).set_input_files(broken)
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 100_000}
    network.send("Network.emulateNetworkConditions", slow)
    page.get_by_role("button", name="Register", exact=True).click()
    expect(page.get_by_role("progressbar", name="Sent")).to_be_visible()
    expect(page.get_by_text("of 4.0 MiB")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled. Nothing is registered.")).to_be_visible()
    network.send("Network.emulateNetworkConditions", {**slow, "uploadThroughput": -1})

    # The folder, with what else is in it
    page.get_by_label("Folder", exact=True).set_input_files(folder)
    page.get_by_label("Activate it").uncheck()
    page.get_by_role("button", name="Register", exact=True).click()
    expect(page.get_by_role("link", name="page/new@1")).to_be_visible()
    receipt = page.get_by_role("region", name="Receipt of page/new@1")
    expect(receipt).to_contain_text("seed2")
    expect(receipt).to_contain_text("2 files")
    details = live.http.get("/v1/adapters/page/new@1").json()
    assert details["active"] is None
    assert set(details["receipt"]["ignored_files"]) == {"seed2/README.md", "seed2/training.jsonl"}

    # The same again, dropped as an archive
    archive = tmp_path / "again.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            packed.write(folder / name, name)
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "again.zip"));
            return transfer;
        }""",
        list(archive.read_bytes()),
    )
    page.get_by_role("heading", name="Register an adapter").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.get_by_label("Name", exact=True)).to_have_value("again")
    page.get_by_label("Name", exact=True).fill("page/new")
    page.get_by_role("button", name="Register", exact=True).click()
    expect(page.get_by_text("Nothing new:")).to_contain_text("page/new@1 has the same content")
    assert grave(page) == []

    # A folder on the server; this one has no --allow-source
    expect(page.get_by_label("A hub or bucket")).to_be_disabled()
    page.get_by_label("A folder on the server").check()
    page.get_by_label("Folder below the server's --adapter-root").fill("nothing")
    page.get_by_label("Name", exact=True).fill("page/new")
    page.get_by_role("button", name="Register", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("field path")
    page.get_by_label("Folder below the server's --adapter-root").fill("seed1")
    page.get_by_role("button", name="Register", exact=True).click()
    expect(page.get_by_role("link", name="page/new@2")).to_be_visible()

    # What the trainer left beside it
    _go(page, "adapters/page/new?version=1")
    card = page.get_by_role("region", name="Model card of page/new@1")
    expect(card.get_by_role("heading", name="The card")).to_be_visible()
    expect(card).to_contain_text("<img src=x onerror=alert(1)>")
    expect(card).not_to_contain_text("library_name")
    expect(card.get_by_role("figure")).to_contain_text("Loss by step")
    assert grave(page) == []


def test_a_canary(operator: Page, live: Live) -> None:
    page = operator
    _register(live, "bot", "seed0", "seed1")
    page.get_by_role("link", name="Aliases").click()
    page.get_by_label("Name", exact=True).fill("prod")
    page.get_by_label("Target 1", exact=True).fill("bot@1")
    page.get_by_label("Target 2", exact=True).fill("bot@2")
    page.get_by_role("button", name="Create").click()
    alias = page.get_by_role("region", name="Alias prod")
    alias.wait_for()
    assert _weights(live) == {"bot@1": 90, "bot@2": 10}

    for user in range(10):
        live.complete(model="prod", user=str(user), max_tokens=2)
    wait_for(live.idle)
    look_again(page)
    expect(alias.get_by_role("columnheader", name="bot@2")).to_be_visible()
    requests = alias.get_by_role("row", name="Requests").get_by_role("cell")
    expect(requests.first).not_to_have_text("0")

    slider = alias.get_by_label("Share of bot@2 in percent")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(alias.get_by_role("status").first).to_have_text("85%")
    alias.get_by_role("button", name="Save the shares").click()
    expect(alias.get_by_text("Saved")).to_be_visible()
    assert grave(page) == []
    assert _weights(live) == {"bot@1": 85, "bot@2": 15}

    # Somebody else changes it meanwhile
    slider.focus()
    page.keyboard.press("ArrowRight")
    live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "bot@2", "weight": 1}]}).raise_for_status()
    look_again(page)
    expect(alias.get_by_text("Somebody else has changed this alias")).to_be_visible()
    alias.get_by_role("button", name="Save the shares").click()
    expect(page.get_by_role("alert")).to_contain_text("It is shown as it is now.")
    assert _weights(live) == {"bot@2": 1}

    both = [{"adapter": "bot@1", "weight": 50}, {"adapter": "bot@2", "weight": 50}]
    live.http.put("/v1/aliases/prod", json={"targets": both}).raise_for_status()
    look_again(page)
    alias.get_by_role("button", name="Promote bot@2 to 100%").click()
    expect(alias.get_by_role("button", name="Promote bot@2 to 100%")).to_have_count(0)
    assert _weights(live) == {"bot@1": 0, "bot@2": 100}
    _go(page, "adapters/bot")
    page.get_by_role("button", name="Delete…", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("What an alias names cannot be deleted.")
    expect(page.get_by_role("button", name="Delete bot", exact=True)).to_be_disabled()
    page.get_by_role("button", name="Keep it").click()

    _go(page, "adapters?alias=prod")
    alias.get_by_role("button", name="Delete…").click()
    assert grave(page) == []
    stop_looking(page)
    page.get_by_role("dialog").get_by_role("button", name="Delete prod").click()
    expect(page.get_by_text("There is no alias yet.")).to_be_visible()


def _weights(live: Live) -> dict[str, float]:
    return {target["adapter"]: target["weight"] for target in live.http.get("/v1/aliases/prod").json()["targets"]}


def test_a_key_that_may_only_look(visit: Visit, live: Live, server: tuple[Live, Mapping[str, str], Path]) -> None:
    page = _signed_in(visit, server, "app")
    expect(page.get_by_text("your key lacks the scope adapters")).to_be_visible()
    page.get_by_role("link", name="red", exact=True).click()
    expect(page.get_by_role("region", name="Receipt of @1")).to_contain_text("this server's base")
    expect(page.get_by_role("button", name="Pin")).to_have_count(0)
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)
    expect(page.get_by_role("region", name="Use")).to_contain_text("by your key")
    live.http.put("/v1/aliases/look", json={"targets": [{"adapter": "red", "weight": 1}]}).raise_for_status()
    _go(page, "adapters?alias=look")
    expect(page.get_by_role("region", name="Alias look")).to_contain_text("your key lacks the scope metrics")
    expect(page.get_by_role("button", name="Edit targets")).to_have_count(0)
    live.http.delete("/v1/aliases/look").raise_for_status()
    wait_for(lambda: not live.http.get("/v1/aliases").json()["data"])
