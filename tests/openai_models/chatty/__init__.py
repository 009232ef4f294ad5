"""Answers as the last message asks: with what it got, in pieces, with tool calls, or not at all."""

import os
import time

from model_interface import InvalidInput, ModelInterface

CLOSED = os.environ.get("TEST_CLOSED")


class Model(ModelInterface):
    metadata = {"task": "chat"}
    queue_size = 1

    def run(self, data, args):
        asked = data[-1]["content"]
        return self._describe(asked) if isinstance(asked, list) else self._answer(asked, data, args)

    def _describe(self, parts):
        return " ".join(part["text"] if part["type"] == "text" else str(part["image"].shape) for part in parts)

    def _answer(self, asked, data, args):
        if asked == "messages":
            return repr(data)
        if asked == "args":
            return repr(sorted(args.items()))
        if asked == "count":
            return self._count(args)
        if asked == "list":
            return ["x"] * args["pieces"]
        if asked == "tools":
            call = {"name": "weather", "arguments": {"city": "Köln"}}
            return {"content": None, "tool_calls": [call], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
        if asked == "cut":
            return {"content": "I was", "finish_reason": "length", "reasoning_content": "long"}
        if asked == "wait":
            time.sleep(args["sleep_s"])
            return "waited"
        if asked == "refuse":
            raise InvalidInput("ask something else")
        if asked == "raise":
            raise RuntimeError("out of words")
        if asked == "nothing":
            return None
        if asked == "unknown":
            return {"text": "hello"}
        if asked == "call":
            return {"tool_calls": [{"function": "weather"}]}
        return str(asked)

    def _count(self, args):
        try:
            for number in range(args.get("max_tokens", 3)):
                if number == args.get("fail_at"):
                    raise RuntimeError("lost count")
                if number == args.get("die_at"):
                    os._exit(9)
                time.sleep(args.get("sleep_s", 0))
                yield f"{number} "
            yield {"finish_reason": "stop", "usage": {"prompt_tokens": 1, "completion_tokens": number + 1}}
        finally:
            if CLOSED:
                with open(CLOSED, "a") as file:
                    file.write("closed\n")
