# The interpreter's side of eval. Runs as `python3 -c <this> CONTROL SIGNALS SIGNUM`: evaluates what
# comes over the descriptor CONTROL, one message at a time, in a module named __main__ that lives as
# long as the process. When SIGNUM arrives, it reads one message from SIGNALS and becomes another
# individual: new seeds, new environment. That works in the middle of an evaluation too.
# Messages are JSON after their length, four bytes, big endian.


def _forkd_driver():
    import ast
    import builtins
    import json
    import linecache
    import os
    import signal
    import struct
    import sys
    import types

    LIMIT = 1 << 20
    SOURCES_KEPT = 200
    control, signals, signum = (int(arg) for arg in sys.argv[1:4])
    for fd in (control, signals):
        os.set_inheritable(fd, False)
    own_pid = os.getpid()
    sys.argv = [""]
    main = types.ModuleType("__main__")
    main.__builtins__ = builtins
    sys.modules["__main__"] = main
    state = {"running": False, "count": 0}

    def read(fd, size):
        parts = []
        while size:
            part = os.read(fd, min(size, 1 << 16))
            if not part:
                os._exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(fd):
        (size,) = struct.unpack(">I", read(fd, 4))
        return json.loads(read(fd, size))

    def send(fd, message):
        data = json.dumps(message).encode()
        data = memoryview(struct.pack(">I", len(data)) + data)
        while data:
            data = data[os.write(fd, data) :]

    def clip(text, limit=LIMIT):
        text = str.__str__(text).encode("utf-8", "backslashreplace")
        if len(text) <= limit:
            return text.decode(), False
        return text[:limit].decode("utf-8", "ignore"), True

    def reseed(modules):
        done = ["python"]
        if "random" in modules:
            modules["random"].seed()
            instance = getattr(modules["random"], "_inst", None)
            if instance is not None:
                instance.seed()
        if "numpy.random" in modules:
            modules["numpy.random"].seed(int.from_bytes(os.urandom(4), "little"))
            done.append("numpy")
        if "uuid" in modules:
            modules["uuid"]._last_timestamp = None
        if "tempfile" in modules:
            modules["tempfile"]._name_sequence = None
        if "_ssl" in modules:
            modules["_ssl"].RAND_add(os.urandom(64), 64.0)
            done.append("ssl")
        if "torch" in modules and hasattr(modules["torch"], "manual_seed"):
            modules["torch"].manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
            done.append("torch")
        return done

    def on_signal(number, frame):
        if os.getpid() != own_pid:
            return
        message = receive(signals)
        try:
            os.environ.update(message.get("env", {}))
            answer = {"reseeded": reseed(sys.modules)}
        except BaseException as error:
            answer = {"error": "%s: %s" % (type(error).__name__, error)}
        send(signals, answer)

    def on_interrupt(number, frame):
        if state["running"] and os.getpid() == own_pid:
            raise KeyboardInterrupt

    def describe(error):
        import traceback

        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == "<string>":
            trace = trace.tb_next
        lines = traceback.format_exception(type(error), error, trace)
        last = traceback.format_exception_only(type(error), error)[-1].strip()
        if isinstance(error, SystemExit):
            last = "SystemExit: %s" % (error.code,)
        return last, "".join(lines)

    def evaluate(code):
        state["count"] += 1
        name = "<eval-%d>" % state["count"]
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        linecache.cache.pop("<eval-%d>" % (state["count"] - SOURCES_KEPT), None)
        tree = ast.parse(code, name)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        if tree.body:
            exec(compile(tree, name, "exec"), main.__dict__)
        if last is None:
            return None
        value = eval(compile(last, name, "eval"), main.__dict__)
        return None if value is None else repr(value)

    def answer(code):
        message = {}
        try:
            try:
                state["running"] = True
                result = evaluate(code)
            finally:
                state["running"] = False
            if result is not None:
                message["result"], message["truncated"] = clip(result)
        except BaseException as error:
            try:
                last, trace = describe(error)
            except BaseException as second:
                last, trace = type(error).__name__, "its description failed: %r" % (type(second),)
            message["error"], cut = clip(last, LIMIT // 8)
            message["traceback"], cut_trace = clip(trace, LIMIT // 4)
            message["truncated"] = cut or cut_trace
        if os.getpid() != own_pid:
            os._exit(0)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException:
                pass
        return message

    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signum, on_signal)
    send(control, {"ready": sys.version.split()[0]})
    while True:
        request = receive(control)
        try:
            message = answer(request["code"])
        except KeyboardInterrupt:
            message = {"error": "KeyboardInterrupt", "traceback": "", "truncated": False}
        send(control, message)


_forkd_driver()
