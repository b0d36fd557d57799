"""A small inference server over HTTP that speaks vLLM's or SGLang's protocol.

It loads Hugging Face folders, computes in float64 NumPy with code of its own, and samples. So it
stands where a real server stands: outside, seeing only what is written and sent.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


class NumpyDecoder:
    """Qwen2, Qwen3 or Llama of a Hugging Face folder: one row at a time, without a cache."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self._w = {name: x.astype(np.float64) for name, x in tensors.items()}

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of the token after `ids`, `[V]`."""
        c, w = self.config, self._w
        heads, kv_heads, size = (
            c[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        x = w["model.embed_tokens.weight"][ids]
        angles = np.arange(len(ids))[:, None] / c["rope_theta"] ** (np.arange(0, size, 2) / size)
        causal = np.tril(np.ones((len(ids), len(ids)), bool))
        for layer in range(c["num_hidden_layers"]):
            p = f"model.layers.{layer}."
            y = self._norm(x, p + "input_layernorm")
            q, k, v = (self._project(y, p + f"self_attn.{n}_proj") for n in "qkv")
            q, k = q.reshape(-1, heads, size), k.reshape(-1, kv_heads, size)
            if p + "self_attn.q_norm.weight" in w:
                q, k = self._norm(q, p + "self_attn.q_norm"), self._norm(k, p + "self_attn.k_norm")
            q, k = rotate(q, angles), rotate(k, angles)
            k, v = (
                np.repeat(z.reshape(-1, kv_heads, size), heads // kv_heads, axis=1) for z in (k, v)
            )
            scores = np.einsum("inh,jnh->nij", q, k) / np.sqrt(size)
            weights = np.exp(log_softmax(np.where(causal, scores, -np.inf)))
            out = np.einsum("nij,jnh->inh", weights, v).reshape(len(ids), -1)
            x = x + self._project(out, p + "self_attn.o_proj")
            y = self._norm(x, p + "post_attention_layernorm")
            gate = self._project(y, p + "mlp.gate_proj")
            up = self._project(y, p + "mlp.up_proj")
            x = x + self._project(gate / (1 + np.exp(-gate)) * up, p + "mlp.down_proj")
        tied = "model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"
        return w[tied] @ self._norm(x[-1], "model.norm")

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.config["rms_norm_eps"]) * self._w[name + ".weight"]

    def _project(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._w[name + ".weight"].T + self._w.get(name + ".bias", 0.0)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def draw(logits: np.ndarray, rng: np.random.Generator, s: dict[str, Any], mode: str):
    """A token and its log-prob: `raw`, `processed` (after truncation) or `scaled` (before it)."""
    raw = log_softmax(logits)
    biased = logits.copy()
    for token, bias in (s.get("logit_bias") or {}).items():
        biased[int(token)] += bias
    if s["temperature"] == 0:
        token = int(biased.argmax())
        return token, (raw if mode == "raw" else log_softmax(biased))[token]
    scaled = log_softmax(biased / s["temperature"])
    probs = np.exp(scaled)
    keep = probs >= s["min_p"] * probs.max()
    order = np.argsort(-probs, kind="stable")
    if s["top_k"] > 0:
        keep[order[s["top_k"] :]] = False
    before = np.cumsum(np.where(keep, probs, 0)[order] / probs[keep].sum())
    keep[order[1:][before[:-1] >= s["top_p"]]] = False
    left = np.where(keep, probs, 0) / probs[keep].sum()
    token = int(rng.choice(len(left), p=left))
    return token, {"raw": raw, "scaled": scaled, "processed": np.log(left + 1e-300)}[mode][token]


class LocalServer:
    """Serves one model. Use as a context manager; everything below may be changed while it runs.

    Attributes:
      url: where it is.
      mode: what log-probs are of; see `draw`.
      asked: bodies of the requests for completions.
      loads: folders it was told to load.
      errors: HTTP statuses with which to answer the next requests for completions instead.
      deaf: whether it says that it has loaded weights and does not.
      dev_mode: whether vLLM's path for that exists.
      delay_s: before a completion.
      die_at: break off and be gone at this many requests for completions.
      spoil: changes an answer before it is sent.
      encode: its tokenizer; None: it has no /tokenize.
    """

    def __init__(self, folder: Path, kind: str = "vllm", **changes: Any):
        self.kind, self.name, self.max_model_len = kind, "student", 4096
        self.mode = "processed" if kind == "vllm" else "scaled"
        self.asked: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.errors: list[int] = []
        self.deaf, self.dev_mode, self.delay_s, self.die_at = False, True, 0.0, 0
        self.spoil: Callable[[dict[str, Any]], None] = lambda answer: None
        self.encode: Callable[[str], list[int]] | None = None
        self.key = ""
        vars(self).update(changes)
        self._model, self._version = NumpyDecoder(folder), "default"
        self._lock, self._sockets = threading.Lock(), set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._sockets.add(self.connection)

            def do_GET(self) -> None:
                self._reply(*server.get(self.path))

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size) or b"null")
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    self._reply(401, {"error": "Unauthorized"})
                else:
                    self._reply(*server.post(self.path, body))

            def _reply(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_: Any) -> None:  # clients that have gone
                pass

        self._http = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> LocalServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()

    def kill(self) -> None:
        """Be gone, with every connection."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            card = {"id": self.name, "object": "model", "max_model_len": self.max_model_len}
            return 200, {"object": "list", "data": [card]}
        if path == "/server_info" and self.kind == "sglang":
            return 200, {"enable_deterministic_inference": False}
        return (405 if path in self._posts() else 404), {"detail": "Method Not Allowed"}

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        if path not in self._posts():
            return 404, {"detail": "Not Found"}
        return self._posts()[path](body)

    def _posts(self) -> dict[str, Callable[[Any], tuple[int, Any]]]:
        if self.kind == "sglang":
            posts = {"/generate": self._generate, "/update_weights_from_disk": self._update}
        else:
            posts = {"/v1/completions": self._completions}
            if self.dev_mode:
                posts["/collective_rpc"] = self._rpc
                posts["/reset_prefix_cache"] = lambda body: (200, {"success": True})
        return posts | ({"/tokenize": self._tokenize} if self.encode else {})

    def _tokenize(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert self.encode
        ids = self.encode(body["prompt"])
        return 200, {"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len}

    def _load(self, folder: str) -> None:
        self.loads.append(folder)
        if not self.deaf:
            self._model = NumpyDecoder(Path(folder))

    def _rpc(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["method"] != "reload_weights":
            return 500, {"error": "no such method"}
        self._load(body["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def _update(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not Path(body["model_path"], "config.json").is_file():
            return 400, {"success": False, "message": "Failed to get weights iterator"}
        self._load(body["model_path"])
        self.name = body["model_path"]
        if not self.deaf:
            self._version = body["weight_version"]
        return 200, {"success": True, "message": "Succeeded", "num_paused_requests": 0}

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        stops = set(body["stop_token_ids"]) | (set() if body["ignore_eos"] else self._eos())
        if status := self._enter(body):
            return status, {"error": {"message": "out of order"}}
        tokens, values = self._sample(body["prompt"], body["max_tokens"], body["seed"], body, stops)
        stopped = tokens[-1] in stops
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": values, "tokens": [str(t) for t in tokens]},
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": tokens[-1] if stopped else None,
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": tokens, "prompt_token_ids": body["prompt"]}
        answer = {"object": "text_completion", "model": self.name, "choices": [choice]}
        self.spoil(answer)
        return 200, answer

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        s = body["sampling_params"]
        stops = set(s["stop_token_ids"]) | self._eos()
        if status := self._enter(body):
            return status, {"error": {"message": "out of order"}}
        seed = s["sampling_seed"]
        tokens, values = self._sample(body["input_ids"], s["max_new_tokens"], seed, s, stops)
        length = len(tokens) >= s["max_new_tokens"]  # which this server looks at first
        about = {
            "finish_reason": {"type": "length" if length else "stop"},
            "weight_version": self._version,
            "output_token_logprobs": [[v, t, None] for v, t in zip(values, tokens, strict=True)],
        }
        answer = {"text": "", "output_ids": tokens, "meta_info": about}
        self.spoil(answer)
        return 200, answer

    def _eos(self) -> set[int]:
        ids = self._model.config.get("eos_token_id", [])
        return set(ids) if isinstance(ids, list) else {ids}

    def _enter(self, body: dict[str, Any]) -> int:
        """Book a request; the status with which it is to fail, or 0."""
        with self._lock:
            self.asked.append(body)
            status = self.errors.pop(0) if self.errors else 0
            dead = bool(self.die_at) and len(self.asked) >= self.die_at
        if dead:
            threading.Thread(target=self.kill).start()
            time.sleep(5)  # the answer never gets out
        time.sleep(self.delay_s)
        return status

    def _sample(
        self, prompt: list[int], limit: int, seed: int, s: dict[str, Any], stops: set[int]
    ) -> tuple[list[int], list[float]]:
        rng, model = np.random.default_rng(seed), self._model
        tokens: list[int] = []
        values: list[float] = []
        while len(tokens) < limit and not (tokens and tokens[-1] in stops):
            token, value = draw(model.logits([*prompt, *tokens]), rng, s, self.mode)
            tokens.append(token)
            values.append(float(value))
        return tokens, values
