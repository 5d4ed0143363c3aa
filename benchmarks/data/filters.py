"""Every step of cleaning alone, on the same text."""

from benchmarks.data.corpus import Corpus
from benchmarks.data.timing import megabytes_per_second, show
from data_pipeline.cleaning import batched
from data_pipeline.document import Document, Step
from data_pipeline.filters import classifier_training
from data_pipeline.filters.classifier import ClassifierFilter
from data_pipeline.filters.language import LanguageFilter
from data_pipeline.filters.quality import RULE_SETS, QualityRules
from data_pipeline.normalize import Normalizer
from data_pipeline.tally import Tally
from data_pipeline.tokenization import END_OF_TEXT
from trainer.data_config import LanguageConfig

TEXT_BYTES = 12_000_000


def measure(corpus: Corpus, rounds: int) -> None:
    texts = corpus.texts(TEXT_BYTES)
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    classifier, _ = classifier_training.fit(texts[::2], [text[::-1] for text in texts[1::2]])
    steps: dict[str, Step] = {
        "normalise": Normalizer((END_OF_TEXT,)),
        "language": LanguageFilter(LanguageConfig(keep={"en": 0.5})),
        **{f"rules, {name}": QualityRules([name]) for name in RULE_SETS},
        "classifier": ClassifierFilter(classifier, 9.0),
    }
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, rates of processor time, batches as the pipeline makes them")

    def through(step: Step) -> None:
        for batch in batched(documents):
            step(batch, Tally())

    show(megabytes_per_second({name: lambda s=step: through(s) for name, step in steps.items()}, megabytes, rounds))
