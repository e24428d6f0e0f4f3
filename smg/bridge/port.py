"""The mesh port, taken before the agent runs, so that a port that is not to be had stops the start (CLI-9).

Owns nothing but the moment: everything else is the transport's. Whoever waits for nothing after `bind` knows the address.
"""

from __future__ import annotations

from mesh import Address
from mesh.transport import ByteStream, Transport


class BoundPort:
    """A `mesh.transport.Transport` that is opened by `bind` and only then given to an agent."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._address: Address | None = None

    async def bind(self) -> Address:
        """Take the port. Raises `mesh.SettingsError` when it cannot be had."""
        if self._address is None:
            self._address = await self._transport.open()
        return self._address

    async def open(self) -> Address:
        """The bound address; taken now if it was not."""
        return await self.bind()

    def close(self) -> None:
        """Give the port back."""
        self._transport.close()

    def send(self, data: bytes, address: Address) -> bool:
        """See `Transport.send`."""
        return self._transport.send(data, address)

    async def wait_datagrams(self) -> None:
        """See `Transport.wait_datagrams`."""
        await self._transport.wait_datagrams()

    def receive_nowait(self, most: int) -> list[tuple[bytes, Address]]:
        """See `Transport.receive_nowait`."""
        return self._transport.receive_nowait(most)

    async def dial(self, address: Address) -> ByteStream:
        """See `Transport.dial`."""
        return await self._transport.dial(address)

    async def accept(self) -> ByteStream:
        """See `Transport.accept`."""
        return await self._transport.accept()

    async def resolve(self, host: str, port: int) -> list[Address]:
        """See `Transport.resolve`."""
        return await self._transport.resolve(host, port)

    def source_towards(self, address: Address | None) -> str | None:
        """See `Transport.source_towards`."""
        return self._transport.source_towards(address)
