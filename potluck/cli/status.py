"""`potluck status`: what the peer of a run is doing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from potluck.cli.daemon import ask_daemon
from potluck.cli.display import megabytes, printable, sat_out_line
from potluck.cli.options import HomeOption, JsonOption, RunOption
from potluck.errors import NetworkError


def status(home: HomeOption = None, run: RunOption = None, as_json: JsonOption = False) -> None:
    """Show this home's runs: round, loss, speed, traffic, group, and an invite for others.

    Example:  potluck status --json
    """
    from potluck.peer.control import ask
    from potluck.peer.home import Home, default_home

    where = Home(home or default_home())
    daemon = ask_daemon(where, "status")
    kept = daemon["runs"] if daemon else []
    if daemon and not as_json:
        print(daemon_line(daemon))
    if run is not None:
        folders = [where.find_run(run)]
    elif not (folders := where.runs()) and not daemon:
        where.find_run()  # says what to do
    for folder in folders:
        mine = next((one for one in kept if one["run"] == folder.run_id), None)
        try:
            answer = asyncio.run(ask(folder.control_socket, "status"))
        except NetworkError as error:
            detail = idle_line(mine) if mine else str(error)
            answer = {"run": folder.run_id, "phase": "not running", "detail": detail}
        answer["daemon"] = {**mine, "rule": daemon["rule"]} if daemon and mine else None
        print(json.dumps(answer) if as_json else _text(answer))
    known = {folder.run_id for folder in folders}
    coming = [one for one in kept if run is None and one["run"] not in known]
    for one in coming:
        answer = {"run": one["run"], "phase": "not running", "detail": idle_line(one), "daemon": one}
        print(json.dumps(answer) if as_json else f"{' '.join(one['arguments'][:2])[:60]}: {idle_line(one)}")
    if daemon and as_json and not folders and not coming:
        print(json.dumps({"run": None, "phase": "not running", "detail": "no run yet", "daemon": daemon}))


def idle_line(one: dict[str, Any]) -> str:
    """What a daemon says of a run that does not answer itself."""
    return f"{one['state']}: {one['reason']}" if one["reason"] else str(one["state"])


def daemon_line(daemon: dict[str, Any]) -> str:
    """Whether it works, or by which rule it does not."""
    wrong = f"\nlimits     {daemon['limits_error']}; those before it are in force" if daemon["limits_error"] else ""
    if daemon["works"]:
        return f"daemon     works{wrong}"
    until = f", until {daemon['until']}" if daemon["until"] else ""
    return f"daemon     paused by {daemon['rule']}: {daemon['reason']}{until}{wrong}"


def _pipeline(pipeline: Any) -> list[str]:
    if not pipeline:
        return []
    stages = []
    for k, stage in enumerate(pipeline["stages"]):
        load = "" if stage["load"] is None else f", load {stage['load']:.2f}"
        rate = f", {stage['samples_per_second']:g} samples/s"
        stages.append(f"{k}: {stage['replicas']} replicas, {stage['keepers']} keepers{load}{rate}")
    keeps = f", keeps {' and '.join(pipeline['keeps'])}" if pipeline["keeps"] else ""
    missing = [f"waiting    nobody serves {' and '.join(pipeline['missing'])}"] if pipeline["missing"] else []
    return [
        *missing,
        f"stages     {'  '.join(stages)}; this peer serves {pipeline['module'] or 'none of them'}{keeps}",
        f"trained    {pipeline['microbatches']} microbatches, {pipeline['resends']} resent, "
        f"{pipeline['thrown_away']} thrown away",
    ]


def _validates(validates: Any) -> list[str]:
    if not validates:
        return []
    rounds = ", ".join(f"{module} before round {round_}" for module, round_ in validates["modules"].items() if round_)
    return [f"validates  {rounds or 'nothing yet'}; {validates['entries']} entries in {validates['ledger']}"]


def _text(answer: dict[str, Any]) -> str:
    if answer["phase"] == "not running":
        return f"run {str(answer['run'])[:8]}: {answer['detail']}"
    loss, rate = answer["loss"], answer["tokens_per_second"]
    round_ = "-" if answer["round"] is None else answer["round"]
    lines = [
        f"run        {answer['run_name']} ({str(answer['run'])[:8]}), {answer['phase']}, round {round_}",
        f"peer       {answer['peer']} {printable(str(answer['name']))}",
        f"loss       {loss:.4f}" if isinstance(loss, float) else "loss       no round finished yet",
        f"speed      {rate:,.0f} tokens/s" if isinstance(rate, float) else "speed      -",
        f"traffic    up {megabytes(float(str(answer['bytes_sent'])))}, "
        f"down {megabytes(float(str(answer['bytes_received'])))}",
        f"group      {len(answer['group'])} contributions last round" + (", training ALONE" if answer["alone"] else ""),
        *([sat_out_line(answer["sat_out"])] if answer.get("sat_out") else []),
        *_pipeline(answer["pipeline"]),
        *_validates(answer["validates"]),
        f"invite     potluck join '{answer['invite']}'",
    ]
    return "\n".join(lines)
