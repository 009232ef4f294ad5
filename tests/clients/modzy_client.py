"""Chassis' OMIClient for Modzy containers. Arguments: port, a PNG file of 8x4 pixels."""

import asyncio
import json
import sys

from chassis.client import OMIClient


async def main():
    async with OMIClient("localhost", int(sys.argv[1])) as client:
        status = await client.status()
        assert (status.status_code, status.model_info.model_name) == (200, "Upper"), status
        assert status.features.batch_size == 4
        assert status.inputs[0].filename == "input"
        answer = await client.run([{"input": b"one"}, {"input": b"bad"}, {"input": b"three"}])
        assert (answer.status_code, answer.message) == (200, "Success with errors."), answer
        assert [item.success for item in answer.outputs] == [True, False, True]
        assert json.loads(answer.outputs[0].output["results.json"]) == {"text": "ONE", "args": {}}
        assert b"bad is bad" in answer.outputs[1].output["error"]
        answer = await client.run([{"input": b"x"}], detect_drift=True, explain=True)
        result = json.loads(answer.outputs[0].output["results.json"])
        assert result["args"] == {"explain": True, "detect_drift": True}, result
        answer = await client.run([{"input": b"x"}, {"other": b"x"}])
        assert answer.status_code == 422, answer
        assert "item 1" in answer.message
        assert (await client.run([])).status_code == 422
        assert (await client.run([{"input": b"bad"}])).status_code == 422
        assert (await client.run([{"input": b"boom"}])).outputs[0].success is False
        assert (await client.shutdown()).status_code == 202


asyncio.run(main())
