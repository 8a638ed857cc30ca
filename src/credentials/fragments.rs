//! Finds a credential in the text of a reply.
//!
//! Upstream or a proxy may echo parts of a request. A text repeats a credential if the two have twelve characters in a row in
//! common. It is compared as it is and after decoding: percent, backslash and numeric HTML escapes, letters of full width and
//! Unicode hyphens, base64 in both alphabets and with any alignment, hex; also one of these inside another one. Case and control
//! characters make no difference. A credential that is compressed, encrypted, hashed, reversed or mixed with other text is not
//! found.

use std::{borrow::Cow, fmt};

use zeroize::Zeroizing;

/// The characters that a text and a credential must have in common.
const MIN_COMMON: usize = 12;

/// Comparing eight bytes at every fourth position finds any twelve bytes.
const GRAM: usize = 8;
const STRIDE: usize = MIN_COMMON - GRAM;

/// Bits of the filter for each gram.
const FILTER_BITS: usize = 64;

/// Encodings inside encodings that are decoded.
const MAX_DEPTH: usize = 3;

/// In a longer text, encodings inside encodings are not decoded: that could take many milliseconds.
const LONG_TEXT: usize = 64 * 1024;

/// Digits of a character's number in an escape, leading zeros and `x` included.
const MAX_DIGITS: usize = 10;

/// All eight bytes in a row of some texts. Holds the credential, so it is wiped on drop and not printed.
pub struct Fragments {
    /// Sorted.
    grams: Zeroizing<Vec<u64>>,
    /// A bit for the hash of each gram: most lookups end here.
    filter: Zeroizing<Vec<u64>>,
    /// The bits of the hash that the filter does not use.
    shift: u32,
}

impl fmt::Debug for Fragments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fragments").finish_non_exhaustive()
    }
}

impl Fragments {
    /// The fragments of a credential, which may have several parts. Parts of less than twelve characters are ignored.
    pub fn from_credential<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut grams = Vec::new();
        for part in parts.into_iter().filter(|part| part.len() >= MIN_COMMON) {
            grams.extend(part.windows(GRAM).map(gram));
            // A text is compared after decoding, so a credential with escapes is too.
            if let Cow::Owned(unescaped) = unescape(part) {
                grams.extend(unescaped.windows(GRAM).map(gram));
            }
        }
        Self::new(grams)
    }

    fn new(mut grams: Vec<u64>) -> Self {
        grams.sort_unstable();
        let bits = (grams.len() * FILTER_BITS).next_power_of_two().max(1024);
        let shift = 64 - bits.ilog2();
        let mut filter = vec![0; bits / 64];
        for gram in &grams {
            let bit = hash(*gram, shift);
            filter[bit / 64] |= 1 << (bit % 64);
        }
        Self {
            grams: Zeroizing::new(grams),
            filter: Zeroizing::new(filter),
            shift,
        }
    }

    /// Whether one of these texts of a reply repeats the credential.
    pub fn are_in<'a>(&self, texts: impl IntoIterator<Item = &'a str>) -> bool {
        let mut texts = texts.into_iter();
        texts.any(|text| decode_all(text, &mut |decoded| self.are_in_bytes(decoded)))
    }

    fn are_in_bytes(&self, text: &[u8]) -> bool {
        let mut rest = text;
        while let Some(window) = rest.first_chunk() {
            if self.may_contain(window) && self.are_around(text, text.len() - rest.len()) {
                return true;
            }
            rest = &rest[STRIDE..];
        }
        false
    }

    /// Whether a common part of twelve bytes includes the gram at this position.
    fn are_around(&self, text: &[u8], at: usize) -> bool {
        (at.saturating_sub(STRIDE)..=at).any(|start| {
            start + MIN_COMMON <= text.len()
                && [start, start + STRIDE].into_iter().all(|at| {
                    let window = text[at..].first_chunk().expect("twelve bytes are left");
                    self.may_contain(window) && self.grams.binary_search(&gram(window)).is_ok()
                })
        })
    }

    #[inline]
    fn may_contain(&self, window: &[u8; GRAM]) -> bool {
        let bit = hash(gram(window), self.shift);
        self.filter[bit / 64] >> (bit % 64) & 1 == 1
    }
}

/// Whether a text repeats a credential whose [`Fragments`] are not worth computing, because it is used for one call.
pub fn repeats(text: &str, credential: &[u8]) -> bool {
    let mut grams = Vec::new();
    decode_all(text, &mut |decoded| {
        grams.extend(decoded.windows(GRAM).map(gram));
        false
    });
    Fragments::new(grams).are_in_bytes(credential)
}

/// Eight bytes, without the bit that distinguishes upper from lower case.
#[inline]
fn gram(bytes: &[u8]) -> u64 {
    let bytes = bytes.first_chunk().expect("windows have eight bytes");
    u64::from_le_bytes(*bytes) | u64::from_le_bytes([b' '; GRAM])
}

/// Fibonacci hashing.
#[inline]
fn hash(gram: u64, shift: u32) -> usize {
    (gram.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> shift) as usize
}

/// Visits a text, and each text that it may encode, until `visit` returns true.
fn decode_all(text: &str, visit: &mut dyn FnMut(&[u8]) -> bool) -> bool {
    let depth = if text.len() > LONG_TEXT { 1 } else { MAX_DEPTH };
    text.len() >= MIN_COMMON && decode(text.as_bytes(), depth, visit)
}

fn decode(text: &[u8], depth: usize, visit: &mut dyn FnMut(&[u8]) -> bool) -> bool {
    if visit(text) {
        return true;
    }
    let unescaped = unescape(text);
    if matches!(unescaped, Cow::Owned(_)) && visit(&unescaped) {
        return true;
    }
    if depth == 0 || unescaped.len() < MIN_BASE64 {
        return false;
    }
    let mut decode_inner = |decoded: Vec<u8>| decode(&decoded, depth - 1, visit);
    runs(&unescaped, is_base64, MIN_BASE64).any(|run| {
        let mut base64_digits = (0..4).map(|offset| &run[offset..]);
        let mut hex_digits = runs(run, u8::is_ascii_hexdigit, MIN_HEX)
            .flat_map(|run| (0..2).map(|offset| &run[offset..]));
        base64_digits.any(|digits| may_be_text_in_base64(digits) && decode_inner(base64(digits)))
            || hex_digits.any(|digits| may_be_text_in_hex(digits) && decode_inner(hex(digits)))
    })
}

/// The longest parts that consist of such bytes and have at least `min` of them.
fn runs(text: &[u8], is_part: impl Fn(&u8) -> bool, min: usize) -> impl Iterator<Item = &[u8]> {
    let mut start = 0;
    std::iter::from_fn(move || {
        // A run that begins here or later includes the last of the next `min` bytes, so most texts are skipped in large steps.
        while let Some(next) = text.get(start..start + min) {
            start += min - next.iter().rev().take_while(|byte| is_part(byte)).count();
            let length = text[start..]
                .iter()
                .take_while(|byte| is_part(byte))
                .count();
            let run = &text[start..start + length];
            start += length;
            if length >= min {
                return Some(run);
            }
        }
        None
    })
}

/// The digits that encode twelve characters.
const MIN_BASE64: usize = MIN_COMMON * 4 / 3;
const MIN_HEX: usize = MIN_COMMON * 2;

/// Whether the digits encode nine ASCII characters in a row, in three groups of four digits. Part of twelve characters is such a part,
/// and few other texts have one.
fn may_be_text_in_base64(digits: &[u8]) -> bool {
    let is_ascii = |group: &[u8]| {
        let digit = |index: usize| BASE64[usize::from(group[index])];
        // The highest bit of each of the three bytes.
        digit(0) & 0b10_0000 | digit(1) & 0b1000 | digit(2) & 0b10 == 0
    };
    let mut row = 0;
    digits.chunks_exact(4).any(|group| {
        row = if is_ascii(group) { row + 1 } else { 0 };
        row == 3
    })
}

/// Whether the digits encode twelve printable ASCII characters in a row.
fn may_be_text_in_hex(digits: &[u8]) -> bool {
    let mut row = 0;
    digits.chunks_exact(2).any(|pair| {
        row = if (b'2'..=b'7').contains(&pair[0]) {
            row + 1
        } else {
            0
        };
        row == MIN_COMMON
    })
}

/// The value of each character of base64, in both alphabets; 255 for all other bytes.
const BASE64: [u8; 256] = {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut values = [u8::MAX; 256];
    let mut value = 0;
    while value < alphabet.len() {
        values[alphabet[value] as usize] = value as u8;
        value += 1;
    }
    values[b'-' as usize] = 62;
    values[b'_' as usize] = 63;
    values
};

fn is_base64(byte: &u8) -> bool {
    BASE64[usize::from(*byte)] != u8::MAX
}

fn base64(digits: &[u8]) -> Vec<u8> {
    let groups = digits.chunks_exact(4);
    let rest = groups.remainder();
    let bytes = |group: [u8; 4]| {
        let [a, b, c, d] = group.map(|digit| u32::from(BASE64[usize::from(digit)]));
        let [_, bytes @ ..] = (a << 18 | b << 12 | c << 6 | d).to_be_bytes();
        bytes
    };
    let whole = groups.map(|group| *group.first_chunk().expect("chunks have four bytes"));
    let mut decoded: Vec<u8> = whole.flat_map(bytes).collect();
    let mut padded = [b'A'; 4];
    padded[..rest.len()].copy_from_slice(rest);
    decoded.extend_from_slice(&bytes(padded)[..rest.len() * 3 / 4]);
    decoded
}

fn hex(digits: &[u8]) -> Vec<u8> {
    let value = |digit: u8| char::from(digit).to_digit(16).unwrap_or_default() as u8;
    let pairs = digits.chunks_exact(2);
    pairs
        .map(|pair| value(pair[0]) << 4 | value(pair[1]))
        .collect()
}

/// Decodes escapes and maps characters that look like ASCII to ASCII, until nothing changes. Borrowed if nothing changes at all.
fn unescape(text: &[u8]) -> Cow<'_, [u8]> {
    let mut unescaped = Cow::Borrowed(text);
    for _ in 0..MAX_DEPTH {
        if is_plain(&unescaped) {
            break;
        }
        let mut next = Vec::with_capacity(unescaped.len());
        unescape_once(&String::from_utf8_lossy(&unescaped), &mut next);
        if *next == *unescaped {
            break;
        }
        unescaped = Cow::Owned(next);
    }
    unescaped
}

/// Whether the text is printable ASCII without the beginning of an escape. Without branches, so that the compiler vectorizes it.
fn is_plain(text: &[u8]) -> bool {
    text.iter().fold(true, |is_plain, byte| {
        is_plain
            & (b' '..=b'~').contains(byte)
            & (*byte != b'%')
            & (*byte != b'\\')
            & (*byte != b'&')
    })
}

fn unescape_once(mut text: &str, unescaped: &mut Vec<u8>) {
    while let Some(character) = text.chars().next() {
        let (decoded, length) = match character {
            '%' => percent(text),
            '\\' => backslash(text),
            '&' => html(text),
            _ => None,
        }
        .unwrap_or((Decoded::Character(character), character.len_utf8()));
        text = &text[length..];
        match decoded {
            // One byte of a character in UTF-8: the next round puts them together.
            Decoded::Byte(byte) => unescaped.push(byte),
            Decoded::Character(character) => {
                let mut buffer = [0; 4];
                unescaped.extend_from_slice(like_ascii(character).map_or(&[], |character| {
                    character.encode_utf8(&mut buffer).as_bytes()
                }));
            }
            Decoded::Nothing => {}
        }
    }
}

enum Decoded {
    Byte(u8),
    Character(char),
    Nothing,
}

fn percent(text: &str) -> Option<(Decoded, usize)> {
    let byte = u8::from_str_radix(text.get(1..3)?, 16).ok()?;
    Some((Decoded::Byte(byte), 3))
}

/// The escapes of JSON and of other languages: `\u002d`, `\u{2d}`, `\x2d`; any other backslash is dropped.
fn backslash(text: &str) -> Option<(Decoded, usize)> {
    let escaped = |digits: Option<&str>, length| {
        let code = u32::from_str_radix(digits?, 16).ok()?;
        Some((Decoded::Character(char::from_u32(code)?), length))
    };
    let braced = text.strip_prefix("\\u{").and_then(|rest| {
        let end = end_of_number(rest, b'}')?;
        escaped(rest.get(..end), end + 4)
    });
    let decoded = match text.as_bytes().get(1) {
        Some(b'u') => braced.or_else(|| escaped(text.get(2..6), 6)),
        Some(b'x') => escaped(text.get(2..4), 4),
        _ => None,
    };
    Some(decoded.unwrap_or((Decoded::Nothing, 1)))
}

/// `&#45;` and `&#x2d;`.
fn html(text: &str) -> Option<(Decoded, usize)> {
    let number = text.strip_prefix("&#")?;
    let end = end_of_number(number, b';')?;
    let number = &number[..end];
    let code = match number.strip_prefix(['x', 'X']) {
        Some(digits) => u32::from_str_radix(digits, 16).ok()?,
        None => number.parse().ok()?,
    };
    Some((Decoded::Character(char::from_u32(code)?), end + 3))
}

/// The position of the byte that ends a number. Numbers of characters have few digits, and searching the rest of a long text for each
/// escape would take too long.
fn end_of_number(text: &str, end: u8) -> Option<usize> {
    text.bytes()
        .take(MAX_DIGITS + 1)
        .position(|byte| byte == end)
}

/// The ASCII character that this one looks like, or itself; `None` for characters without width.
fn like_ascii(character: char) -> Option<char> {
    match character {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(character) - 0xfee0),
        '\u{2010}'..='\u{2015}' | '\u{2043}' | '\u{2212}' | '\u{fe58}' | '\u{fe63}' => Some('-'),
        '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{2064}' | '\u{feff}' => None,
        character => (!character.is_control()).then_some(character),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOKEN: &str = "MIIFTgYJKo+Zhvc/NAQcCoIIFPz-CCQTs_CAQExDT";

    fn is_found(text: &str) -> bool {
        let found = Fragments::from_credential([TOKEN.as_bytes()]).are_in([text]);
        assert_eq!(repeats(text, TOKEN.as_bytes()), found, "{text}");
        found
    }

    fn encode_base64(bytes: &[u8], alphabet: &[u8; 64]) -> String {
        let digits = bytes.chunks(3).flat_map(|group| {
            let mut padded = [0; 4];
            padded[1..=group.len()].copy_from_slice(group);
            let bits = u32::from_be_bytes(padded);
            let digit = move |shift: u32| char::from(alphabet[(bits >> shift & 63) as usize]);
            [18, 12, 6, 0].map(digit).into_iter().take(group.len() + 1)
        });
        digits.collect()
    }

    fn alphabet(last: [u8; 2]) -> [u8; 64] {
        let mut alphabet: Vec<u8> = (b'A'..=b'Z')
            .chain(b'a'..=b'z')
            .chain(b'0'..=b'9')
            .collect();
        alphabet.extend(last);
        alphabet.try_into().unwrap()
    }

    fn encode_hex(text: &str) -> String {
        text.bytes().map(|byte| format!("{byte:02x}")).collect()
    }

    fn percent_encode(text: &str) -> String {
        text.bytes().map(|byte| format!("%{byte:02X}")).collect()
    }

    fn escape(text: &str, form: fn(u32) -> String) -> String {
        text.chars().map(|c| form(u32::from(c))).collect()
    }

    /// The text in each form that is decoded, by name.
    fn forms(text: &str) -> Vec<(&'static str, String)> {
        let standard = alphabet(*b"+/");
        let url_safe = alphabet(*b"-_");
        let base64 = |text: &str| encode_base64(text.as_bytes(), &standard);
        vec![
            ("as it is", text.to_owned()),
            ("upper case", text.to_uppercase()),
            ("in quotes", format!("\"{text}\"")),
            ("base64", base64(text)),
            ("base64, one byte before", base64(&format!(":{text}"))),
            ("base64, two bytes before", base64(&format!("a:{text}"))),
            ("base64 in a word", format!("xy{}", base64(text))),
            (
                "base64 of a text",
                base64(&format!("X-Auth-Token: {text}\n")),
            ),
            ("base64 for URLs", encode_base64(text.as_bytes(), &url_safe)),
            ("base64 twice", base64(&base64(text))),
            ("base64 of percent", base64(&percent_encode(text))),
            ("hex", encode_hex(text)),
            ("upper-case hex", encode_hex(text).to_uppercase()),
            ("hex, shifted", format!("0{}", encode_hex(text))),
            ("hex of base64", encode_hex(&base64(text))),
            ("percent", percent_encode(text)),
            ("percent twice", percent_encode(&percent_encode(text))),
            ("percent of base64", percent_encode(&base64(text))),
            ("JSON", escape(text, |c| format!("\\u{c:04x}"))),
            ("braces", escape(text, |c| format!("\\u{{{c:x}}}"))),
            ("two digits", escape(text, |c| format!("\\x{c:02x}"))),
            ("HTML", escape(text, |c| format!("&#{c};"))),
            ("HTML, hex", escape(text, |c| format!("&#x{c:X};"))),
            (
                "backslashes",
                escape(text, |c| format!("\\{}", char::from_u32(c).unwrap())),
            ),
            (
                "full width",
                escape(text, |c| char::from_u32(c + 0xfee0).unwrap().to_string()),
            ),
            (
                "zero width",
                escape(text, |c| format!("{}\u{200b}", char::from_u32(c).unwrap())),
            ),
            (
                "line breaks",
                escape(text, |c| format!("{}\n", char::from_u32(c).unwrap())),
            ),
            ("hyphen", text.replace('-', "\u{2010}")),
            ("minus", text.replace('-', "\u{2212}")),
            ("percent of a hyphen", text.replace('-', "%E2%80%91")),
        ]
    }

    #[test]
    fn a_credential_is_found_in_every_form() {
        for (name, text) in forms(TOKEN) {
            assert!(is_found(&text), "{name}: {text}");
            let inside = format!("token \u{4e0d}: [{text}] is bad");
            assert!(is_found(&inside), "{name}, inside: {inside}");
        }
    }

    #[test]
    fn twelve_characters_are_found_in_every_form_and_at_every_position_and_eleven_are_not() {
        for start in 0..=TOKEN.len() - MIN_COMMON {
            for (name, text) in forms(&TOKEN[start..start + MIN_COMMON]) {
                for before in 0..4 {
                    let text = format!("{}{text}", &"!?.:"[..before]);
                    assert!(is_found(&text), "{name}: {text}");
                }
            }
            for (name, text) in forms(&TOKEN[start..start + MIN_COMMON - 1]) {
                assert!(!is_found(&text), "{name}: {text}");
            }
        }
    }

    #[test]
    fn ordinary_texts_and_their_own_escapes_are_not_a_credential() {
        let texts = [
            "",
            "rds-mysql-2",
            "1ffc4167903840cb93a3da56d28c14fdin01",
            "e7a7535b-eb9b-45ac-a83a-020dc5016d94",
            "2026-11-30T16:20:28+0000",
            "Incorrect IAM authentication information: x-auth-token not found",
            "100 % of \\ & &#; &#x110000; \\u12 \\uzzzz %zz %",
            "\u{6570}\u{636e}\u{5e93}\u{5b9e}\u{4f8b}\u{521b}\u{5efa}\u{4efb}\u{52a1}",
        ];

        for text in texts {
            assert!(!is_found(text), "{text}");
        }
    }

    #[test]
    fn each_part_counts_and_one_of_less_than_twelve_characters_does_not() {
        let parts = ["ACCESSKEYIDOFTHEFACADE", "short-part", "100%25-secret\\key"];
        let fragments = Fragments::from_credential(parts.map(str::as_bytes));

        let found = parts.map(|part| fragments.are_in([part]));
        assert_eq!(found, [true, false, true]);
        assert!(
            fragments.are_in(["100%2525-secret\\\\key"]),
            "escaped again"
        );
        assert!(!Fragments::from_credential([]).are_in([TOKEN]));
    }

    #[test]
    fn a_long_text_is_searched_to_its_end() {
        let fragments = Fragments::from_credential([TOKEN.as_bytes()]);
        let mut text = "V".repeat(1 << 20);
        assert!(!fragments.are_in([&*text]));

        text.push_str(TOKEN);
        assert!(fragments.are_in([&*text]));
        assert!(fragments.are_in(["a"; 1000].into_iter().chain([&*text, "z"])));
        for part in ["&#", "\\u{", "%", "&#1;", "AAAA", "5555"] {
            assert!(!fragments.are_in([&*part.repeat(1 << 19)]), "{part}");
        }
    }

    proptest! {
        #[test]
        fn a_random_text_can_be_searched_and_hides_no_credential(
            before in "([%&#;xu{}\\\\0-9A-Za-f+/_ -]|\\PC){0,60}",
            form in 0..forms("").len(),
            after in "\\PC{0,60}",
        ) {
            let text = &forms(TOKEN)[form].1;
            // A separator, so that the text before it does not become part of an encoding.
            let apart = format!("{before}\n {text} {after}");
            prop_assert!(is_found(&apart), "{}", apart);
            is_found(&format!("{before}{text}"));
        }
    }

    #[test]
    fn debug_shows_nothing() {
        let fragments = Fragments::from_credential([TOKEN.as_bytes()]);

        assert_eq!(format!("{fragments:?}"), "Fragments { .. }");
    }
}
