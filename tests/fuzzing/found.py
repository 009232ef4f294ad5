"""The smallest input of each fault that fuzzing has found, by target: none of them may be one again."""

_NAME = b"\x0f\0\0\x00127.0.0.1:50000"  # a server's greeting
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde"

INPUTS: dict[str, list[bytes]] = {
    "model_mesh": [
        b"\0\0\x0a\1m\x1a\x88\x27" + b"x" * 5000,  # a path that is too long for the system
        b"\0\0\x0a\1m\x1a\1\0",  # NUL as a path
    ],
    "images": [  # OpenCV would make room for 4 GB
        _PNG + b"\xff\0\0\0IDAT",
        _PNG + b"\0\0\0\0IDAT\0\0\0\0\xff\xff\xff\xffIEND",
    ],
    "http": [  # an answer to a request after that to the malformed chunk behind it
        b"POST /models/echo/run HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n",
    ],
    "open_inference": [b"\5\0\n\4echo*\x11\n\1x\x12\4FP16\x1a\1\1*\3B\1a"],  # bytes as the contents of FP16
    "texts": [b'{"$array": {"dtype": "float16", "data": 70000}}'],  # a warning in the log
    "local_client": [
        b"\0\2" + _NAME + b"\7\0\0\0\x03\0wrong \xc3",  # an error that is not UTF-8
        b"\3\2" + _NAME + b"\4\0\0\0\0\0\xda\5O\n",  # no message
        b"\0\2" + _NAME + b'\x08\0\0\0\0\0\x12\0\x12\4"\2\x08\1',  # a place outside of the memory
        b"\0\2\1\0\0\0\xff",  # a server whose name is not UTF-8
        b"\0\2" + _NAME + b"\0\0\0\0\x80\0",  # final, and no error
    ],
    "client_answers": [b"\0\n\1{", b"\1\n\4rows", b"\5R\1{", b'\0\n\r{"$array": 0}'],
    "reports": [b"tms-retries: many", b"\n\n\xeb"],
}
