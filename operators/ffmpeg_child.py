"""One run of ffmpeg or ffprobe on an untrusted file: limits, what it may open, what it wrote.

A process for each run, so a codec's crash or leak ends with it. `prlimit` sets the limits and becomes
the program: a preexec_fn is not safe in a worker with threads. No shell. Only local files and only
the formats listed: a playlist in the corpus must not name files or hosts for us to open.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from operators.errors import MediaError
from operators.settings import AudioSettings, VideoSettings

# Demuxers by ffmpeg's names. Not here: what opens other files (hls, dash, concat, imf, sdp, ...),
# devices, raw PCM without a header, pictures, subtitles, and coded video without a container, which
# has no times.
FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,ast,au,avi,caf,dsf,dts,dtshd,dv,eac3,flac,flv,g722,g729"
    ",gif,gsm,gxf,ivf,loas,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,mxf,nistsphere,nsv,nut,ogg,oma,qcp,rm"
    ",sox,swf,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma,yuv4mpegpipe"
)
# subfile: the beginning of a local file (VideoFacts.url)
PROTOCOLS = "file,pipe,subfile"
INPUT = ("-protocol_whitelist", PROTOCOLS, "-format_whitelist", FORMATS)
# Of a file in a store: ranged.py, whose URL no proxy knows.
REMOTE = ("-protocol_whitelist", "http,tcp", "-format_whitelist", FORMATS, "-http_proxy", "")
# Of what it says: the first lines name the cause, thousands may follow.
MESSAGE_BYTES = 4000
READ_BYTES = 1 << 20
# Stands in a command for the pipe that `notes` come through; a file name without a colon needs no
# escaping inside of a filter.
NOTES = "@NOTES@"
MOST_NOTES_BYTES = 64 << 20
# Its libraries map 400 MB before a file is opened.
BASE_MEMORY_BYTES = 1 << 29
UNSUPPORTED = re.compile(
    r"misdetection possible|Invalid data found when processing input|Unknown (?:input )?format"
    r"|could not find codec parameters|Decoder .* not found|Unsupported codec",
    re.IGNORECASE,
)
DAMAGED = re.compile(r"moov atom not found|Truncat|End of file|partial file|EBML header", re.I)


@dataclass(frozen=True)
class Done:
    """How a run ended: exit status (negative: by this signal), what came out, what it said.

    cut: it was ended by us because enough had come. notes: what was written to NOTES.
    section: the settings that hold its limits.
    """

    status: int
    stdout: bytearray
    message: str
    cut: bool = False
    notes: bytes = b""
    section: str = "audio"

    def failure(self) -> MediaError:
        """What a run that gave nothing means for its file."""
        if "not on whitelist" in self.message:
            return MediaError("decode.unsupported", "playlists and this format are not opened")
        said = re.sub(r"(?:file:)?(?:/[^/:\s]+)+", "", self.message)
        said = " / ".join(line.strip(" :") for line in said.splitlines() if line.strip())[:300]
        if "Cannot allocate memory" in self.message or self.status == -signal.SIGABRT:
            return MediaError(
                "decode.out_of_memory", f"decoding needs more than {self.section}.max_memory_bytes"
            )
        if self.status == -signal.SIGXCPU:
            said = f"decoding took more CPU time than {self.section}.timeout_s"
            return MediaError("decode.timeout", said)
        if self.status < 0:
            how = signal.strsignal(-self.status)
            return MediaError("decode.crashed", f"ffmpeg was ended by {how}")
        if DAMAGED.search(self.message):
            return MediaError("decode.corrupt", said)
        if UNSUPPORTED.search(self.message):
            return MediaError("decode.unsupported", said)
        return MediaError("decode.corrupt", said or "nothing could be decoded")


def run(
    command: Sequence[str],
    settings: AudioSettings | VideoSettings,
    *,
    most_bytes: int,
    ends: float | None = None,
) -> Done:
    """Run to the end, or until most_bytes of stdout are there.

    ends: the monotonic time at which timeout_s is over, where several runs share it. Raises
    MediaError decode.timeout. A missing program is an OSError: a broken machine.
    """
    if ends is None:
        ends = time.monotonic() + settings.timeout_s
    limits = [
        "prlimit",
        f"--as={BASE_MEMORY_BYTES + settings.max_memory_bytes}",
        # an orphan that hangs in a loop ends too
        f"--cpu={int(settings.timeout_s) + 1}",
        "--core=0",
    ]
    notes, notes_end = os.pipe()
    limited = [*limits, *(part.replace(NOTES, f"/dev/fd/{notes_end}") for part in command)]
    try:
        # a list, no shell; the file's name is one argument
        process = subprocess.Popen(  # noqa: S603
            limited,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(notes_end,),
            process_group=0,
        )
    except OSError:
        os.close(notes)
        raise
    finally:
        os.close(notes_end)
    assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018
    out, said, noted = bytearray(), bytearray(), bytearray()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, out)
            selector.register(process.stderr, selectors.EVENT_READ, said)
            selector.register(notes, selectors.EVENT_READ, noted)
            while selector.get_map() and len(out) < most_bytes:
                ready = selector.select(max(0.0, ends - time.monotonic()))
                if not ready:
                    raise MediaError("decode.timeout", f"no end in {settings.timeout_s:g} s")
                for key, _ in ready:
                    data = os.read(key.fd, READ_BYTES)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data is said:
                        said += data[: MESSAGE_BYTES - len(said)]
                    elif key.data is noted:
                        noted += data[: MOST_NOTES_BYTES - len(noted)]
                    else:
                        out += data
        cut = len(out) >= most_bytes
        if not cut:
            try:
                process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise MediaError("decode.timeout", f"no end in {settings.timeout_s:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        os.close(notes)
    message = said.decode("utf-8", "replace")
    status = 0 if cut else process.returncode
    section = "video" if isinstance(settings, VideoSettings) else "audio"
    # as it is: of frames it holds up to 256 MB, and a copy would as well
    del out[most_bytes:]
    return Done(status, out, message, cut, bytes(noted), section)
