"""The length of a body on BentoML: ``bentoml serve bentoml_length:Length --port PORT``."""

from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType


@bentoml.service(workers=2)
class Length:
    @bentoml.api(route="/inference")
    def length(self, data: Annotated[Path, ContentType("application/octet-stream")], /) -> int:
        return len(data.read_bytes())
