"""A Poise reward for verl 0.9.1, as its reward manager, which sees the prompt of every sample:

    reward.reward_manager.source=importlib
    reward.reward_manager.name=PoiseRewardManager
    reward.reward_manager.module.path=pkg://poise.integrations.verl_manager

The data needs no column for it. It refuses verl's own reward-model path, which would go around it.
"""

from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from poise.integrations.verl_reward import answer_of, check_turns, refuse_own_model
from poise.models.chat_format import decode_completions
from poise.serve.client import own_client


class PoiseRewardManager(RewardManagerBase):
    """The served reward of each sample, with every head and uncertainty; the same names for every sample.

    A response is decoded behind its prompt: alone it would lose the space that it begins with where a tokenizer begins
    every text so.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **_: Any):
        super().__init__(config, tokenizer, compute_score)
        if config.reward.reward_model.enable:
            refuse_own_model()

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Of the last sequence in `data`, a DataProto. Raises PoiseError if there is no reward."""
        item = data[-1]
        check_turns(item.non_tensor_batch.get("__num_turns__"))
        mask, written = item.batch["attention_mask"].bool(), item.batch["responses"]
        before, after = mask.split([len(mask) - len(written), len(written)])
        asked = item.batch["prompts"][before].tolist()
        [text] = decode_completions(self.tokenizer, asked, [written[after].tolist()])
        prompt = [dict(turn) for turn in item.non_tensor_batch["raw_prompt"]]
        answer = answer_of((await own_client().ascore(prompt, [text]))[0])
        return {"reward_score": answer["score"], "reward_extra_info": answer}
