//! Hand-written HTTP/2 frames, for what client libraries do not send (RFC 9113, section 4.1).

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const ACK: u8 = 1;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

/// One received frame.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    /// The error code of `RST_STREAM` or GOAWAY.
    pub(super) fn error(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The preface and empty settings.
pub(super) fn opening() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    bytes
}

/// The header block of a valid call, uncompressed (RFC 7541, section 6.2.2).
pub(super) fn block(path: &str) -> Vec<u8> {
    block_with(path, &[])
}

/// The header block of a call with further fields, which replace those of the same name.
pub(super) fn block_with(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "facade"),
        (":path", path),
        ("content-type", "application/grpc"),
    ];
    let is_kept = |field: &&(&str, &str)| more.iter().all(|(name, _)| *name != field.0);
    let mut bytes = Vec::new();
    for (name, value) in fields.iter().filter(is_kept).chain(more) {
        bytes.push(0);
        for text in [name, value] {
            push_length(&mut bytes, text.len());
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// Appends the length of a string (RFC 7541, section 5.1).
fn push_length(bytes: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else {
        return bytes.push(length as u8);
    };
    bytes.push(127);
    while rest >= 128 {
        bytes.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    bytes.push(rest as u8);
}

/// The HEADERS frame with this header block, and as many CONTINUATION frames as it needs.
pub(super) fn headers(stream: u32, block: &[u8]) -> Vec<u8> {
    let pieces: Vec<_> = block.chunks(16 << 10).collect();
    let mut bytes = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let kind = if index == 0 { HEADERS } else { CONTINUATION };
        let is_last = index + 1 == pieces.len();
        bytes.extend(frame(kind, END_HEADERS * u8::from(is_last), stream, piece));
    }
    bytes
}

/// All complete frames in `bytes`.
pub(super) fn parse(mut bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some((payload, rest)) = rest.split_at_checked(length) else {
            break;
        };
        frames.push(Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes(head[5..].try_into().unwrap()),
            payload: payload.to_vec(),
        });
        bytes = rest;
    }
    frames
}

/// The number of fields of a header block that are added to the decoder's table (RFC 7541, section 6).
pub(super) fn table_additions(mut block: &[u8]) -> usize {
    let mut additions = 0;
    while let Some(&kind) = block.first() {
        let (prefix, literal) = match kind {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => panic!("a table size update"),
            _ => (4, true),
        };
        let name = integer(&mut block, prefix);
        if literal {
            additions += usize::from(kind >= 0x40);
            for _ in 0..1 + usize::from(name == 0) {
                let length = integer(&mut block, 7);
                block = &block[length..];
            }
        }
    }
    additions
}

/// Decodes an integer (RFC 7541, section 5.1).
fn integer(block: &mut &[u8], prefix: u32) -> usize {
    let mut next = || usize::from(*block.split_off_first().unwrap());
    let most = (1 << prefix) - 1;
    let mut value = next() & most;
    if value == most {
        for shift in (0..).step_by(7) {
            let byte = next();
            value += (byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
    }
    value
}
