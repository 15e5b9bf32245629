# ruff: noqa: E501, RUF001  sentences, with the punctuation of Chinese
"""The READMEs' one table of results, speed at equal quality, in both languages, from `equal.json`."""

from __future__ import annotations

from typing import Any

from records import Record, command, engine, figure, machine, ratio_of, read, spread, table

WORDS = {
    "en": {
        "about": "Demo model, one request: prompt {prompt}, output {output} tokens; {machine}. Medians of {rounds} rounds"
        " in turn (10th to 90th percentile), ratios [95 % interval]. KL: mean divergence of the distributions of the"
        " next token from the source in bf16, in nats, on {tokens} tokens.",
        "head": "{peer}|Hasten|KL, theirs / ours|decode tok/s, theirs|ours|ours / theirs|prefill, ours / theirs",
        "bits": "bits",
        "to": "to",
        "cores": "cores",
        "disturbed": "{count} of the rounds were disturbed by another process",
        "quiet": "no round was disturbed by another process",
        "made": "Made by `{command}`; {disturbed}.",
    },
    "zh": {
        "about": "演示模型，单个请求：提示词 {prompt} 个词元，输出 {output} 个词元；{machine}。{rounds} 轮交替测量的中位数"
        "（第 10 至第 90 百分位），比值附 [95 % 区间]。KL 散度：下一词元的概率分布相对 bf16 原模型的平均散度，"
        "以纳特为单位，在 {tokens} 个词元上评判。",
        "head": "{peer}|Hasten|KL 散度，前者 / 后者|解码速度，词元/秒，前者|后者|后者 / 前者|读入提示词，后者 / 前者",
        "bits": "位",
        "to": "至",
        "cores": "个核心",
        "disturbed": "其中 {count} 轮受到其他进程干扰",
        "quiet": "没有一轮受到其他进程干扰",
        "made": "由 `{command}` 得出；{disturbed}。",
    },
}
"""What differs between the languages; figures and commands do not."""


def results(language: str) -> str:
    """The block in one language: how it was measured, the table, the command."""
    record = read("equal")
    words, speed = WORDS[language], record["details"]["pairs"][0]["speed"]
    about = words["about"].format(
        prompt=speed["workload"]["prompt"],
        output=speed["workload"]["output"],
        machine=machine(record).replace("cores", words["cores"]),
        rounds=speed["subject"]["decode_tok_per_s"]["n"],
        tokens=f"{record['details']['tokens']:,}",
    )
    head = words["head"].format(peer=engine(speed["peers"][0])).split("|")
    rows = [_row(pair, words) for pair in record["details"]["pairs"]]
    return f"{about}\n\n{table(head, rows)}\n{_made(record, words)}\n"


def _row(pair: dict[str, Any], words: dict[str, str]) -> tuple[str, ...]:
    ours, peer, speed = pair["ours"], pair["peer"], pair["speed"]
    theirs = speed["peers"][0]
    shown = [spread(run["decode_tok_per_s"]).replace("to", words["to"]) for run in (theirs, speed["subject"])]
    return (
        f"{theirs['format'].upper()}, {peer['bits']:.2f} {words['bits']}",
        f"`{ours['name']}`, {ours['bits']:.2f} {words['bits']}",
        f"{figure(peer['kl_mean'])} / {figure(ours['kl_mean'])}",
        shown[0],
        f"**{shown[1]}**",
        ratio_of(speed, peer["name"], "decode"),
        ratio_of(speed, peer["name"], "prefill"),
    )


def _made(record: Record, words: dict[str, str]) -> str:
    runs = [
        run
        for pair in record["details"]["pairs"]
        for run in (pair["speed"]["subject"], *pair["speed"]["peers"])
    ]
    count = sum(run.get("disturbed_rounds") or 0 for run in runs)
    disturbed = words["disturbed"].format(count=count) if count else words["quiet"]
    return words["made"].format(command=command(record), disturbed=disturbed)
