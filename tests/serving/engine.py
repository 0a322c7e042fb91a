"""Runs vLLM on requests in a process of its own: JSON in, JSON out."""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams


def main() -> None:
    given = json.load(sys.stdin)
    llm = LLM(**given["options"])
    params = []
    for request in given["requests"]:
        if "structured_outputs" in request["params"]:
            request["params"]["structured_outputs"] = StructuredOutputsParams(
                **request["params"]["structured_outputs"]
            )
        params.append(SamplingParams(**request["params"]))
    prompts = [{"prompt_token_ids": request["prompt"]} for request in given["requests"]]
    if given["at_once"]:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    else:
        outputs = [
            llm.generate([prompt], [own], use_tqdm=False)[0] for prompt, own in zip(prompts, params, strict=True)
        ]
    completions = [output.outputs[0] for output in outputs]
    result = {
        "tokens": [[*completion.token_ids] for completion in completions],
        "logprobs": [
            completion.logprobs
            and [place[token].logprob for token, place in zip(completion.token_ids, completion.logprobs, strict=True)]
            for completion in completions
        ],
    }
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    if "worker_cls" in given["options"]:
        result["counts"] = [worker.sampler.judged, worker.sampler.refused]
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")


if __name__ == "__main__":
    main()
