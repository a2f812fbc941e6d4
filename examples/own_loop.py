"""The cache and the loss in your own training loop: python examples/own_loop.py FOLDER_OF_A_NEW_CACHE"""

import hashlib
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache
from dualkl import DualKLConfig, TopKTeacher, dual_kl
from dualkl.compress import compress

MODELS, K, EPOCHS = "examples/arithmetic/", 16, 6
QUESTIONS = [f"Mia has {n} pens and buys 7 more. How many pens does Mia have now?" for n in range(2, 10)]
ZEROS = ("policy_step", "refresh_index", "occurrence", "sample_index")
ORIGIN = {**dict.fromkeys(ZEROS, 0), "run_id": "own", "policy_hash": "start", "behaviour_entropy": None}


@torch.no_grad()
def record(question: str, student: Any, teacher: Any, tokenizer: Any) -> cache.Record:
    """The student answers and the teacher scores every token of the answer."""
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    ids = student.generate(prompt, do_sample=True, top_k=0, max_new_tokens=48)
    answer, scored = ids[0, prompt.shape[1] :], slice(prompt.shape[1] - 1, -1)  # t - 1 predicts t
    own = student(ids).logits[0, scored].log_softmax(-1).gather(1, answer[:, None])[:, 0]
    kept = compress(teacher.model(ids)[0][0, scored], teacher.lm_head.weight, answer, k=K)
    row_id, ended = hashlib.md5(text.encode()).hexdigest(), answer[-1] == tokenizer.eos_token_id
    names: dict[str, Any] = ORIGIN | {"row_id": row_id, "prompt_id": question, "prompt_text": text}
    names |= {"completion_text": tokenizer.decode(answer), "finish_reason": "eos" if ended else "length"}
    tokens: dict[str, Any] = {"prompt_ids": prompt[0], "completion_ids": answer, "behaviour_logprobs": own}
    tokens |= {"teacher_logprobs": kept.sampled_logprobs, "teacher_entropy": kept.entropy}
    tokens |= {"top1_id": kept.ids[:, 0], "top1_logprob": kept.logprobs[:, 0]}
    signal = cache.TopK(kept.ids.numpy(), kept.logprobs.numpy(), kept.log_tail_mass.numpy())
    return cache.Record(signal=signal, log_tail_mass=signal.log_tail_mass, **names, **tokens)


def loss_of(row: Any, student: Any) -> torch.Tensor:
    tokens = torch.tensor([*row.prompt_ids, *row.completion_ids])[None]
    states = student.model(tokens)[0][0, len(row.prompt_ids) - 1 : -1]
    topk: Any = map(torch.from_numpy, (row.signal.ids, row.signal.logprobs, row.signal.log_tail_mass))
    return dual_kl(states, student.lm_head.weight, TopKTeacher(*topk), DualKLConfig(tau=0.1, alpha=40.0)).loss


student, teacher = (AutoModelForCausalLM.from_pretrained(MODELS + n).float() for n in ("student", "teacher"))
tokenizer = AutoTokenizer.from_pretrained(MODELS + "student")
signal = {"kind": "topk", "k": K, "temperature": 1.0}
with cache.Writer(sys.argv[1], cache.Fingerprint({"vocab_size": len(tokenizer), "signal": signal})) as writer:
    for question in QUESTIONS:
        writer.append(record(question, student, teacher, tokenizer))
    writer.commit("first")
optimizer, snapshot = torch.optim.AdamW(student.parameters(), lr=3e-4), cache.open(sys.argv[1])
for epoch in range(EPOCHS):
    losses = torch.stack([loss_of(row, student) for row in cache.stream(snapshot, seed=0, epoch=epoch)])
    losses.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {epoch + 1}: {losses.mean().item():.4f} nats a token")
