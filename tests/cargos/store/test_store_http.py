"""Files over HTTP: resumed, bounded, checked, whatever the server does."""

import pytest
import trio

from cargos.errors import CargoError, FetchFailed, SourceFailed, WrongContent
from cargos.sources import FetchSettings
from cargos.store import CargoStore

MIB = 1024 * 1024


@pytest.fixture
def base(tmp_path):
    """Loopback http is for manifests that lie on this machine."""
    return tmp_path


async def test_a_file_is_fetched_verified_and_found_again(server, store, cargo, blob, base, steps):
    data = blob(3 * MIB)
    served = server.serve("/m.gguf", data)
    manifest = cargo(("m.gguf", data, [f"{server.url}/m.gguf"]))
    paths = await store.ensure(manifest, base=base, progress=steps.append)
    assert paths["m.gguf"].read_bytes() == data
    assert paths["m.gguf"].name == "m.gguf"
    assert [step.state for step in steps][-1] == "done"
    downloading = [step.done_bytes for step in steps if step.state == "downloading"]
    assert downloading == sorted(downloading)
    assert downloading[-1] == len(data)
    assert {step.total_bytes for step in steps} == {len(data)}
    again = await store.ensure(manifest, base=base)
    assert again == paths
    assert len(served.requests) == 1
    assert "range" not in served.requests[0]
    assert served.requests[0]["accept-encoding"] == "identity"


async def test_cut_connections_are_resumed_where_they_broke(server, store, cargo, blob, base, steps):
    data = blob(3 * MIB)
    served = server.serve("/m", data, cuts=[MIB, 100_000, 0, 1_500_000])
    paths = await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base, progress=steps.append)
    assert paths["m"].read_bytes() == data
    starts = [int(r.get("range", "bytes=0-")[6:-1]) for r in served.requests]
    assert starts == [0, MIB, MIB + 100_000, MIB + 100_000, MIB + 1_600_000]
    assert served.sent_bytes == len(data)
    assert "retrying" in {step.state for step in steps}


async def test_a_server_without_range_starts_over(server, store, cargo, blob, base):
    data = blob(2 * MIB)
    served = server.serve("/m", data, ranges=False, cuts=[MIB])
    paths = await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)
    assert paths["m"].read_bytes() == data
    assert served.requests[1]["range"] == f"bytes={MIB}-"
    assert served.sent_bytes == 3 * MIB


async def test_without_content_length_the_end_is_checked_by_size(server, store, cargo, blob, base):
    data = blob(2 * MIB)
    served = server.serve("/m", data, content_length=None, cuts=[MIB])
    paths = await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)
    assert paths["m"].read_bytes() == data
    assert len(served.requests) == 2


async def test_wrong_hash_names_file_expected_and_got_and_leaves_nothing(
    server, store, cargo, blob, base, leftovers
):
    data, other = blob(2 * MIB, 1), blob(2 * MIB, 2)
    server.serve("/m", other)
    manifest = cargo(("weights.gguf", data, [f"{server.url}/m"]))
    with pytest.raises(FetchFailed) as caught:
        await store.ensure(manifest, base=base)
    (cause,) = caught.value.causes
    assert isinstance(cause, WrongContent)
    theirs = cargo(("x", other, ["file:x"])).files[0].sha256
    for said in ("weights.gguf", manifest.files[0].sha256, theirs, f"{server.url}/m"):
        assert said in str(caught.value)
    assert leftovers() == []


async def test_a_bad_leftover_is_thrown_away_and_the_file_fetched_anew(server, store, cargo, blob, base):
    data = blob(2 * MIB)
    served = server.serve("/m", data)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    (store.root / "parts").mkdir(parents=True)
    (store.root / "parts" / f"{manifest.files[0].sha256}.part").write_bytes(b"x" * MIB)
    paths = await store.ensure(manifest, base=base)
    assert paths["m"].read_bytes() == data
    assert [r.get("range") for r in served.requests] == [f"bytes={MIB}-", None]


async def test_a_leftover_and_a_source_of_wrong_content_end_in_an_error(
    server, store, cargo, blob, base, leftovers
):
    data = blob(2 * MIB, 1)
    served = server.serve("/m", blob(2 * MIB, 2))
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    (store.root / "parts").mkdir(parents=True)
    (store.root / "parts" / f"{manifest.files[0].sha256}.part").write_bytes(data[:MIB])
    with trio.fail_after(20), pytest.raises(FetchFailed, match="wrong content"):
        await store.ensure(manifest, base=base)
    assert len(served.requests) == 2
    assert leftovers() == []


@pytest.mark.parametrize("leftover", [2 * MIB, 2 * MIB + 5])
async def test_a_leftover_as_long_as_the_file_or_longer(server, store, cargo, blob, base, leftover):
    data = blob(2 * MIB)
    served = server.serve("/m", data)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    (store.root / "parts").mkdir(parents=True)
    part = store.root / "parts" / f"{manifest.files[0].sha256}.part"
    part.write_bytes((data + b"more!")[:leftover])
    assert (await store.ensure(manifest, base=base))["m"].read_bytes() == data
    assert len(served.requests) == (0 if leftover == len(data) else 1)


async def test_more_bytes_than_promised_are_cut_off(server, store, cargo, blob, base, leftovers):
    data = blob(MIB)
    endless = server.serve("/m", data + blob(20 * MIB, 3), content_length=None)
    with pytest.raises(FetchFailed, match="got more") as caught:
        await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)
    assert isinstance(caught.value.causes[0], WrongContent)
    assert leftovers() == []
    assert endless.sent_bytes < 20 * MIB


async def test_another_size_is_refused_before_the_body(server, store, cargo, blob, base, leftovers):
    server.serve("/m", blob(5 * MIB))
    with pytest.raises(FetchFailed, match=f"expected {MIB} bytes, got {5 * MIB} bytes on the server"):
        await store.ensure(cargo(("m", blob(MIB), [f"{server.url}/m"])), base=base)
    assert leftovers() == []


async def test_another_size_in_content_range_is_refused(server, store, cargo, blob, base):
    data = blob(MIB)
    server.serve("/m", data, cuts=[300_000], content_range=f"bytes 300000-{9 * MIB - 1}/{9 * MIB}")
    with pytest.raises(FetchFailed, match=f"got {9 * MIB} bytes on the server"):
        await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)


async def test_a_range_that_was_not_asked_for_starts_over(server, store, cargo, blob, base):
    data = blob(MIB)
    served = server.serve("/m", data, cuts=[300_000], content_range=f"bytes 5-{MIB - 1}/{MIB}")
    paths = await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)
    assert paths["m"].read_bytes() == data
    assert [r.get("range") for r in served.requests] == [None, "bytes=300000-", None]


async def test_sources_are_tried_in_order_and_a_part_is_taken_over(server, store, cargo, blob, base):
    data = blob(2 * MIB)
    broken = server.serve("/broken", data, cuts=[1_500_000, 0, 0, 0, 0])
    good = server.serve("/good", data)
    unused = server.serve("/unused", data)
    sources = [f"{server.url}/{name}" for name in ("missing", "broken", "good", "unused")]
    paths = await store.ensure(cargo(("m", data, sources)), base=base)
    assert paths["m"].read_bytes() == data
    assert len(broken.requests) == 4  # the first brought much and is still one of the attempts
    assert [r["range"] for r in good.requests] == ["bytes=1500000-"]
    assert unused.requests == []


async def test_a_poisoned_start_by_one_source_does_not_spoil_the_next(server, store, cargo, blob, base):
    data = blob(2 * MIB, 1)
    server.serve("/bad", blob(2 * MIB, 2), cuts=[MIB, 0, 0, 0])
    good = server.serve("/good", data)
    manifest = cargo(("m", data, [f"{server.url}/bad", f"{server.url}/good"]))
    assert (await store.ensure(manifest, base=base))["m"].read_bytes() == data
    assert [r.get("range") for r in good.requests] == [f"bytes={MIB}-", None]


@pytest.mark.parametrize("ranges", [True, False])
async def test_a_source_of_the_wrong_size_does_not_cost_what_another_sent(
    server, store, cargo, blob, base, ranges
):
    data = blob(2 * MIB)
    server.serve("/half", data, cuts=[MIB, 0, 0, 0])
    server.serve("/wrong", blob(3 * MIB), ranges=ranges)
    good = server.serve("/good", data)
    sources = [f"{server.url}/{name}" for name in ("half", "wrong", "good")]
    assert (await store.ensure(cargo(("m", data, sources)), base=base))["m"].read_bytes() == data
    assert [r.get("range") for r in good.requests] == [f"bytes={MIB}-"]


async def test_all_sources_failing_says_why_for_each(server, store, cargo, blob, base):
    server.serve("/busy", b"", statuses=[503] * 9)
    server.serve("/private", b"", token="secret")
    sources = [f"{server.url}/{name}" for name in ("missing", "busy", "private")]
    with pytest.raises(FetchFailed) as caught:
        await store.ensure(cargo(("m", blob(10), sources)), base=base)
    text = str(caught.value)
    assert [type(cause) for cause in caught.value.causes] == [SourceFailed] * 3
    for said in ("HTTP 404", "HTTP 503 (4 attempts)", "HTTP 401", "HF_TOKEN", *sources):
        assert said in text


async def test_busy_servers_are_asked_again(server, store, cargo, blob, base):
    data = blob(1000)
    served = server.serve("/m", data, statuses=[503, 429, 200])
    assert (await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base))["m"].read_bytes() == data
    assert len(served.requests) == 3


async def test_a_silent_server_is_given_up(server, store, cargo, blob, base, tmp_path):
    data = blob(MIB)
    server.serve("/m", data, hold_after=128 * 1024)
    impatient = CargoStore(store.root, FetchSettings(stall_timeout_s=0.1, backoff_s=0.01, attempts=2))
    with pytest.raises(FetchFailed, match="ReadTimeout"):
        await impatient.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)
    (part,) = (store.root / "parts").iterdir()  # for the next attempt
    assert data.startswith(part.read_bytes())
    assert part.stat().st_size == 128 * 1024


async def test_a_trickling_server_is_given_up(server, store, cargo, blob, base):
    data = blob(MIB)
    server.serve("/m", data)
    hasty = CargoStore(
        store.root,
        FetchSettings(rate_window_s=0.0, min_rate_bytes_s=1 << 50, attempts=1, backoff_s=0.01),
    )
    with pytest.raises(FetchFailed, match="slower than"):
        await hasty.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)


async def test_encoded_content_is_refused(server, store, cargo, blob, base):
    data = blob(1000)
    server.serve("/m", data, encoding="gzip")
    with pytest.raises(FetchFailed, match="encodes"):
        await store.ensure(cargo(("m", data, [f"{server.url}/m"])), base=base)


async def test_redirects_are_followed_within_bounds(server, store, cargo, blob, base):
    data = blob(1000)
    server.serve("/m", data)
    for i in range(1, 8):
        server.serve(f"/{i}", b"", redirect=f"{server.url}/{i - 1}" if i > 1 else "/m")
    assert (await store.ensure(cargo(("m", data, [f"{server.url}/5"])), base=base))["m"].read_bytes() == data
    other = blob(1000, 9)
    with pytest.raises(FetchFailed, match="more than 5 redirects"):
        await store.ensure(cargo(("m", other, [f"{server.url}/7"])), base=base)
    server.serve("/ftp", b"", redirect="ftp://127.0.0.1/m")
    with pytest.raises(FetchFailed, match="redirected to ftp:"):
        await store.ensure(cargo(("m", other, [f"{server.url}/ftp"])), base=base)


async def test_https_with_the_certificates_of_the_environment(tls_server, store, cargo, blob, base):
    data = blob(MIB)
    tls_server.serve("/m", data, cuts=[300_000])
    paths = await store.ensure(cargo(("m", data, [f"{tls_server.url}/m"])), base=base)
    assert paths["m"].read_bytes() == data


async def test_an_unknown_certificate_is_refused(tls_server, store, cargo, blob, base, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    served = tls_server.serve("/m", blob(10))
    with pytest.raises(FetchFailed, match=r"certificate is not trusted: .*\n.*SSL_CERT_FILE"):
        await store.ensure(cargo(("m", blob(10), [f"{tls_server.url}/m"])), base=base)
    assert served.requests == []


async def test_https_never_ends_in_http(tls_server, server, store, cargo, blob, base):
    plain = server.serve("/m", blob(10))
    tls_server.serve("/m", b"", redirect=f"{server.url}/m")
    with pytest.raises(FetchFailed, match="redirected to http:"):
        await store.ensure(cargo(("m", blob(10), [f"{tls_server.url}/m"])), base=base)
    assert plain.requests == []


async def test_a_server_elsewhere_can_not_send_us_to_local_ones(lan_server, server, store, cargo, blob):
    """And a token does not travel to it in the clear."""
    local = server.serve("/m", blob(10))
    far = lan_server.serve("/o/r/resolve/v1/m", b"", redirect=f"{server.url}/m")
    hub = FetchSettings(hub_endpoint=lan_server.url, hub_token="hf_secret")
    with pytest.raises(FetchFailed, match="redirected to this machine"):
        await CargoStore(store.root, hub).ensure(cargo(("m", blob(10), ["hf:o/r@v1/m"])))
    assert local.requests == []
    assert "authorization" not in far.requests[0]


async def test_a_manifest_from_elsewhere_may_not_knock_at_local_servers(server, store, cargo, blob):
    served = server.serve("/m", blob(10))
    with pytest.raises(FetchFailed, match="from elsewhere"):
        await store.ensure(cargo(("m", blob(10), [f"{server.url}/m"])), base=None)
    assert served.requests == []


async def test_cancelling_keeps_what_came(server, store, cargo, blob, base):
    data = blob(2 * MIB)
    served = server.serve("/m", data, hold_after=MIB + 64 * 1024)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    with trio.CancelScope() as scope:

        def stop(step):
            if step.done_bytes >= MIB + 64 * 1024:
                scope.cancel()

        await store.ensure(manifest, base=base, progress=stop)
    assert scope.cancelled_caught
    (part,) = (store.root / "parts").iterdir()
    assert part.read_bytes() == data[: MIB + 64 * 1024]
    served.hold_after = None
    assert (await store.ensure(manifest, base=base))["m"].read_bytes() == data
    assert served.requests[1]["range"] == f"bytes={MIB + 64 * 1024}-"


class TestHub:
    """`hf:` against a server of the hub's shape: /OWNER/REPO/resolve/REVISION/PATH, redirecting to storage."""

    SOURCE = "hf:org/repo@v1/sub dir/m.gguf"
    PATH = "/org/repo/resolve/v1/sub%20dir/m.gguf"

    def hub(self, server, store, **environment):
        settings = FetchSettings.from_environment({"HF_ENDPOINT": server.url, **environment})
        return CargoStore(store.root, settings)

    async def test_resolve_url_and_redirect_to_storage(self, server, store, cargo, blob):
        data = blob(MIB)
        served = server.serve(self.PATH, b"", redirect="/storage/abc?signature=1")
        server.serve("/storage/abc?signature=1", data, cuts=[400_000])
        manifest = cargo(("m.gguf", data, [self.SOURCE]))
        paths = await self.hub(server, store).ensure(manifest)  # no base: the hub is the user's choice
        assert paths["m.gguf"].read_bytes() == data
        assert "authorization" not in served.requests[0]
        assert len(served.requests) == 2  # storage addresses expire: a resume asks the hub again

    async def test_the_token_opens_gated_files_and_stays_with_the_hub(self, server, store, cargo, blob):
        data = blob(1000)
        elsewhere = f"{server.url.replace('127.0.0.1', 'localhost')}/storage"
        server.serve(self.PATH, b"", redirect="/gate")
        server.serve("/gate", b"", redirect=elsewhere)
        storage = server.serve("/storage", data)
        manifest = cargo(("m.gguf", data, [self.SOURCE]))
        await self.hub(server, store, HF_TOKEN="hf_secret").ensure(manifest)
        assert server.files["/gate"].requests[0]["authorization"] == "Bearer hf_secret"
        assert "authorization" not in storage.requests[0]

    async def test_without_the_token_the_error_says_so(self, server, store, cargo, blob):
        server.serve(self.PATH, blob(10), token="hf_secret")
        with pytest.raises(FetchFailed, match="set HF_TOKEN"):
            await self.hub(server, store).ensure(cargo(("m", blob(10), [self.SOURCE])))

    def test_endpoints(self):
        assert FetchSettings.from_environment({}).hub_endpoint == "https://huggingface.co"
        assert "secret" not in repr(FetchSettings.from_environment({"HF_TOKEN": "secret"}))
        for bad in ("huggingface.co", "ftp://x/", "https://", "http://[::1"):
            with pytest.raises(CargoError, match="HF_ENDPOINT"):
                FetchSettings.from_environment({"HF_ENDPOINT": bad})


async def test_two_tasks_of_one_process_download_once(server, store, cargo, blob, base, steps):
    data = blob(2 * MIB)
    served = server.serve("/m", data, hold_after=MIB)
    manifest = cargo(("m", data, [f"{server.url}/m"]))
    results = []

    async def one():
        results.append(await store.ensure(manifest, base=base, progress=note))

    def note(step):
        steps.append(step)
        if step.state == "waiting":
            served.release.set()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
    assert results[0] == results[1]
    assert len(served.requests) == 1
