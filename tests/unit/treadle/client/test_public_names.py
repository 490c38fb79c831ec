"""What `treadle` and `treadle.client` offer: a name goes only on purpose."""

from __future__ import annotations

import treadle
import treadle.client

NAMES = """
    Alias Answer AnswerStream Artifact ArtifactFile AsyncClient BatchItem CheckpointQuantization
    Choice Chunk Classifications ClassifyOptions ClassifyRequest Client ContinuationScore
    Credentials DamagedFile Deployment DeploymentTarget DerivationProgress DevicePlan Downloaded
    DtypeShare EmbedOptions EmbedRequest Embeddings Eviction Evictions GenerationOptions
    GenerationRequest HubOptions ImportProgress LabelScore Lease MemoryEstimate Message ModelChange
    ModelInspection ModelSource Promotion Prompt RankedDocument Ranking RegistryClient RerankOptions
    RerankRequest ScoreInput ScoreRequest Scores ServedModel ServingConfiguration SyncAnswerStream
    TagOptions TagRequest TaggedSpan TaggedTexts TargetStatus TaskFacts TaskOptions TokenLogprobs
    TokenizedTexts TokenizerClient Usage Verification
""".split()


def test_the_public_names():
    assert sorted(treadle.client.__all__) == sorted(NAMES)
    assert all(hasattr(treadle.client, name) for name in NAMES)
    assert set(treadle.__all__) - {"__version__"} <= set(NAMES)
    assert all(getattr(treadle, name) is not None for name in treadle.__all__)
    print(f"{len(NAMES)} names of treadle.client, {len(treadle.__all__)} of treadle")
