"""What an Island says of itself, made of its settings and this machine."""

from __future__ import annotations

import os

import msgspec
import psutil
import pytest

from cargos.manifest import RuntimeType
from cargos.resolve import resolve_cargo
from node.adverts import MEMORY_STEP_MIB, AdvertMaker
from node.config import AskSettings, CoordinatorSettings, NodeSettings
from node.settings import SettingsError, load_settings
from node.state import HostedCargo
from protocol.adverts import ADVERT, IslandAdvert, Window
from protocol.codec import encode
from protocol.limits import MIB

SETTINGS = NodeSettings(
    name="isle",
    region="eu-west",
    country="CH",
    schedule=("mon 18:00-23:30", "sun 00:00-24:00"),
    asks=AskSettings(prompt_ucr=100, output_ucr=400, unit_ucr=7),
)


def advert_of(settings: NodeSettings) -> IslandAdvert:
    maker = AdvertMaker(settings, [RuntimeType.WASM, RuntimeType.LLMCPP], "1.2.3")
    hosted = HostedCargo(resolve_cargo("smollm2-135m"))
    made = maker.advert([hosted], None, draining=False, addresses=("/ip4/192.0.2.1/tcp/1",), coordinate=5)
    return ADVERT.decode_untrusted(encode(made))


def test_settings_and_machine_are_told() -> None:
    advert = advert_of(SETTINGS)
    assert (advert.name, advert.region, advert.country, advert.version) == ("isle", "eu-west", "CH", "1.2.3")
    assert advert.runtimes == ("llmcpp", "wasm")
    assert advert.schedule == (Window(18 * 60, 330), Window(6 * 1440, 1440))
    assert advert.hardware.memory_mib == psutil.virtual_memory().total // MIB
    assert 1 <= advert.hardware.threads <= (os.cpu_count() or 1)
    assert advert.memory_mib % MEMORY_STEP_MIB == 0
    (offer,) = advert.cargos
    assert (offer.prompt_ask_ucr, offer.output_ask_ucr, offer.unit_ask_ucr) == (100, 400, 7)
    assert offer.shard is None


def test_the_coordinators_country_is_the_islands_unless_said() -> None:
    coordinator = CoordinatorSettings(country="DE")
    assert advert_of(msgspec.structs.replace(SETTINGS, coordinator=coordinator)).country == "CH"
    assert advert_of(msgspec.structs.replace(SETTINGS, coordinator=coordinator, country="")).country == "DE"


def test_wrong_settings_are_refused_before_anything_starts() -> None:
    with pytest.raises(SettingsError, match=r"schedule: 'mon 9-17'"):
        AdvertMaker(msgspec.structs.replace(SETTINGS, schedule=("mon 9-17",)), [], "1")
    with pytest.raises(SettingsError, match="country"):
        load_settings(NodeSettings, file=None, environ={}, overrides={"country": "ch"})
    with pytest.raises(SettingsError, match=r"asks\.prompt_ucr"):
        load_settings(NodeSettings, file=None, environ={"ARCHI_ASKS_PROMPT_UCR": "-1"}, overrides={})
    read = load_settings(NodeSettings, file=None, environ={"ARCHI_SCHEDULE": "daily 08:00-20:00"}, overrides={})
    assert read.schedule == ("daily 08:00-20:00",)
