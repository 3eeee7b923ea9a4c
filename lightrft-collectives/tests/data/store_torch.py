"""The torch side of tests/store_torch.rs: `client PORT` checks a store, `server` serves one until its input ends."""

import datetime
import sys

import torch.distributed as dist


def client(port):
    limit = datetime.timedelta(seconds=30)
    store = dist.TCPStore("127.0.0.1", port, None, False, timeout=limit)
    check(store)
    # What the Rust side has set, and an answer to it.
    assert store.get("from rust") == b"\x00\xff"
    store.set("from torch", b"\xff\x00")
    part = dist.PrefixStore("outer", dist.PrefixStore("inner", store))
    assert part.get("k") == b"nested", part.get("k")
    # Both sides at one barrier, twice.
    for _ in range(2):
        store.barrier("both", 2, limit)
    assert store.queue_pop("to torch") == b"first"


def check(store):
    store.set("k", "vv")
    assert store.get("k") == b"vv"
    assert store.add("ctr", -7) == -7 and store.add("ctr", 9) == 2
    assert store.check(["k"]) and not store.check(["k", "missing"])
    assert store.compare_set("c", "", "a") == b"a"
    assert store.compare_set("c", "b", "d") == b"a"
    assert store.compare_set("z", "b", "d") == b"b"
    store.append("k", "!")
    assert store.get("k") == b"vv!"
    store.multi_set(["m", "n"], ["1", ""])
    assert store.multi_get(["m", "n"]) == [b"1", b""]
    before = store.num_keys()
    assert store.delete_key("m") and not store.delete_key("m")
    assert store.num_keys() == before - 1
    assert "n" in store.list_keys() and "m" not in store.list_keys()
    store.queue_push("q", "9")
    assert store.queue_len("q") == 1 and store.check(["q"])
    assert store.queue_pop("q") == b"9" and store.queue_len("q") == 0
    try:
        store.wait(["missing"], datetime.timedelta(milliseconds=50))
        raise AssertionError("waited for a missing key in vain and did not notice")
    except dist.DistStoreError:
        pass
    store.wait(["k", "ctr"], datetime.timedelta(seconds=30))


def server():
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    print(store.port, flush=True)
    sys.stdin.read()


if sys.argv[1] == "server":
    server()
else:
    client(int(sys.argv[2]))
