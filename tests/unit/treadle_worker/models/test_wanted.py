"""What a worker is to serve, from what is deployed and what it is told."""

from __future__ import annotations

import pytest

from treadle.deployments import Deployment, KnownModels, ServingConfiguration, Target
from treadle.errors import FailedPrecondition
from treadle.models.profile import ServingProfile
from treadle_worker.config import EngineConfig
from treadle_worker.models.configuration import complete, configured, filled
from treadle_worker.models.wanted import Claim, to_take_up, wanted

A, B = Target("sha256:a"), Target("sha256:b", ServingConfiguration(quantization="int8"))


def known(*deployments: Deployment, **aliases: str) -> KnownModels:
    models = KnownModels()
    models.aliases.update(aliases)
    for deployment in deployments:
        models.set_deployment(deployment)
    return models


def of(claims: list[Claim]) -> list[tuple[str, str, bool]]:
    return [(claim.name, claim.artifact_digest, claim.required) for claim in claims]


def test_before_the_watch_has_said_anything_names_mean_what_the_registry_answered():
    resolved = {"x": "sha256:a"}
    assert of(wanted(None, ["x", "y", "sha256:d"], resolved, others=True)) == [
        ("x", "sha256:a", True),
        ("sha256:d", "sha256:d", True),
    ]
    assert of(wanted(known(x="sha256:b"), ["x", "y"], resolved, others=True)) == [("x", "sha256:b", True)]


def test_of_a_named_alias_both_is_served_what_is_and_what_is_to_be():
    models = known(Deployment("x", (B,), (A,), warm_up_prompts=("hello",)), x="sha256:a")
    claims = wanted(models, ["x"], {}, others=False)
    assert of(claims) == [("x", "sha256:a", True), ("x", "sha256:b", True)]
    assert claims[1].configuration.quantization == "int8"
    assert claims[1].warm_up_prompts == ("hello",)
    models.set_deployment(Deployment("x", (B,), (B,)))
    assert of(wanted(models, ["x"], {}, others=False)) == [("x", "sha256:b", True)]
    models.delete_deployment("x")
    assert of(wanted(models, ["x"], {}, others=False)) == [("x", "sha256:a", True)]


def test_other_deployments_are_taken_up_where_that_is_asked_for():
    models = known(Deployment("x", (A,), (A,)), Deployment("y", (B,), (A,)), z="sha256:c")
    assert of(wanted(models, ["x"], {}, others=False)) == [("x", "sha256:a", True)]
    assert of(wanted(models, ["x"], {}, others=True)) == [
        ("x", "sha256:a", True),
        ("y", "sha256:a", False),
        ("y", "sha256:b", False),
    ]


def test_no_more_models_are_asked_for_than_there_is_room():
    claims = [Claim(name, digest, required=False) for name, digest in zip("xyz", "abc", strict=True)]
    same = Claim("w", "a", required=False)
    assert to_take_up([*claims, Claim("n", "d")], [], limit=1) == claims
    assert to_take_up([*claims, same], claims[:1], limit=1) == [same]
    assert to_take_up([*claims, same], claims[:1], limit=3) == [*claims[1:], same]
    assert to_take_up([*claims, same], claims[:1], limit=2) == [same]
    other = Claim("x", "d", required=False)
    assert to_take_up([*claims, other], claims[:1], limit=2) == [other]
    assert to_take_up(claims, claims[:2], limit=2) == []
    assert to_take_up(claims, [], limit=0) == []


def test_a_deployments_configuration_goes_before_the_settings():
    settings = EngineConfig(dtype="float32", quantization="int8")
    assert complete(settings) == ServingConfiguration("float32", "int8", "float32")
    asked = configured(settings, ServingConfiguration("bfloat16", "int4", "int8"))
    assert complete(asked) == ServingConfiguration("bfloat16", "int4", "int8")
    assert configured(settings, ServingConfiguration()) == settings
    with pytest.raises(FailedPrecondition, match="dtype 'float7'") as caught:
        configured(settings, ServingConfiguration("float7"))
    assert caught.value.reason == "NOT_SERVABLE_HERE"


def test_auto_is_bfloat16_for_decoders_and_float32_for_encoders():
    settings = EngineConfig()
    assert settings.profile("sha256:0") == ServingProfile("sha256:0", "bfloat16"), "as it always was"
    assert settings.resolved(is_encoder=True).profile("sha256:0") == ServingProfile("sha256:0", "float32")
    assert complete(settings) == ServingConfiguration("bfloat16", "", "bfloat16")
    claim = Claim("x", "sha256:a")
    assert filled(claim, settings).configuration.dtype == "bfloat16"
    assert filled(claim, settings, is_encoder=True).configuration.dtype == "float32"
    told = Claim("x", "sha256:a", ServingConfiguration("float16"))
    assert filled(told, settings, is_encoder=True).configuration.dtype == "float16"
    assert EngineConfig(dtype="float16").resolved(is_encoder=True).dtype == "float16"
