"""A text model: which language is it? A pretrained classifier from a package. Shows texts and typed errors."""

from typing import Any

import py3langid

from model_interface import InvalidInput, ModelInterface


class Model(ModelInterface):
    """The languages that a text may be in, likeliest first."""

    example = "Guten Morgen"

    def run(self, data: Any, args: dict[str, Any]) -> list[dict[str, Any]]:
        """``[{"language", "score"}]`` with ISO 639 codes; ``args["top"]`` of them, 1 by default."""
        if not isinstance(data, str) or not data.strip():
            raise InvalidInput("send a text that is not empty")
        ranked = py3langid.rank(data)[: args.get("top", 1)]
        return [{"language": language, "score": score} for language, score in ranked]
