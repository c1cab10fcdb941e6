"""A text, a model and a recipe that train in a second."""

from minids.config import ModelConfig
from minids.data.batches import tokenize
from minids.data.corpus import Document
from minids.data.tokenizer import ByteTokenizer
from minids.model.transformer import MiniDS
from minids.training.pretrain import Recipe, TextData

WORDS = "one two three four five six seven eight nine ten".split()


def counting_text(documents: int = 40) -> list[Document]:
    """Documents that count, each from another number: easy to learn, and every position differs."""
    return [
        Document(" ".join(WORDS[(i + j) % len(WORDS)] for j in range(20 + i)), "prose" if i % 2 else "code", str(i))
        for i in range(documents)
    ]


def counting_data() -> TextData:
    tokenizer, documents = ByteTokenizer(), counting_text()
    return TextData(tokenize(documents[:32], tokenizer), tokenize(documents[32:], tokenizer), tokenizer)


def nano(**changes) -> MiniDS:
    return MiniDS(ModelConfig.preset("nano", num_hidden_layers=2, **changes))


RECIPE = Recipe(
    steps=12, batch_size=4, seq_len=32, warmup_steps=2, evaluate_every=4, evaluation_batches=2, checkpoint_every=3
)
