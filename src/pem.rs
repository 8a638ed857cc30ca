//! PEM files of certificates and keys. A byte order mark, which some editors and `cat` of several files leave behind, is skipped; a
//! certificate that cannot be read is an error and not left out, because every certificate of a bundle is there for a peer.

use std::{fs, path::PathBuf};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use crate::options::{self, Parsed};

/// Why certificates cannot be used. Holds no content of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No certificate at all.
    #[error("must contain at least one certificate in PEM form")]
    None,
    /// The certificate with this number in the file, counted from 1, is damaged.
    #[error("certificate {0} cannot be read; it must be a complete X.509 certificate in PEM form")]
    Entry(usize),
}

/// The certificates of a file, at least one.
///
/// # Errors
/// [`Error`] if the file holds no certificate, or names the first that is not PEM.
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let text = String::from_utf8_lossy(pem);
    // Splits by itself: the library's iterator skips a certificate whose first line is damaged or follows a byte order mark.
    let sections = text.split("-BEGIN ").skip(1);
    let certificates = sections
        .filter(|section| {
            section
                .lines()
                .next()
                .unwrap_or_default()
                .contains("CERTIFICATE")
        })
        .enumerate()
        .map(|(index, section)| {
            CertificateDer::from_pem_slice(format!("-----BEGIN {section}").as_bytes())
                .map_err(|_| Error::Entry(index + 1))
        })
        .collect::<Result<Vec<_>, _>>()?;
    match certificates.is_empty() {
        true => Err(Error::None),
        false => Ok(certificates),
    }
}

/// The certificates of a file as trusted roots.
///
/// # Errors
/// [`Error`] if the file holds no certificate, or names the first that is not one.
pub fn roots(pem: &[u8]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for (index, certificate) in certificates(pem)?.into_iter().enumerate() {
        let added = roots.add(certificate);
        added.map_err(|_| Error::Entry(index + 1))?;
    }
    Ok(roots)
}

/// The first private key of a file; `None` if no key can be read.
pub fn private_key(pem: &[u8]) -> Option<PrivateKeyDer<'static>> {
    const BEGIN: &[u8] = b"-----BEGIN ";
    let starts = (0..pem.len()).filter(|at| pem[*at..].starts_with(BEGIN));
    // Not as text like certificates, which would leave a copy of the key in memory.
    starts
        .map(|at| &pem[at..])
        .find_map(|section| PrivateKeyDer::from_pem_slice(section).ok())
}

/// The content of a file without a byte order mark.
pub fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content)
}

/// The path of a file of trusted roots, for a flag.
///
/// # Errors
/// The rest of an error sentence.
pub fn roots_file(text: &str) -> Parsed<PathBuf> {
    let path = options::public_file(text)?;
    // A pipe (process substitution of a shell) can be read once, so it is left to the use of the roots.
    if !path.is_file() {
        return Ok(path);
    }
    let pem = fs::read(&path).map_err(|error| format!("cannot be read: {error}"))?;
    match roots(&pem) {
        Ok(_) => Ok(path),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::generate_simple_self_signed;

    use super::*;

    fn pem() -> String {
        let made = generate_simple_self_signed(vec!["localhost".to_owned()]);
        made.unwrap().cert.pem()
    }

    #[test]
    fn every_certificate_is_read_or_named_by_its_number() {
        let [one, two, three] = [pem(), pem(), pem()];
        let damaged = [
            ("not base64", two.replacen("MII", "M!I", 1)),
            ("not a certificate", two.replacen("MII", "MIX", 1)),
            ("truncated", two[..two.len() / 2].to_owned()),
            ("without its last line", two.replacen("-----END", "", 1)),
            (
                "without a dash after BEGIN",
                two.replacen("CERTIFICATE-----", "CERTIFICATE----", 1),
            ),
            (
                "another kind",
                two.replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
            ),
            (
                "empty",
                "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n".to_owned(),
            ),
        ];

        for (case, two) in damaged {
            let bundle = format!("{one}{two}\n{three}");
            assert_eq!(
                roots(bundle.as_bytes()).unwrap_err(),
                Error::Entry(2),
                "{case}"
            );
        }
        let comment = "# subject: a BEGIN of\r\n";
        let bundles = [
            (format!("{one}{two}{three}"), 3),
            (format!("\u{feff}{one}\u{feff}{two}"), 2),
            (format!("{comment}{one}{comment}{two}"), 2),
            (
                format!("{one}{}", two.replacen("-----BEGIN", "----BEGIN", 1)),
                2,
            ),
            (format!("{one}{two}").replace('\n', "\r\n"), 2),
        ];
        for (bundle, count) in bundles {
            assert_eq!(
                certificates(bundle.as_bytes()).unwrap().len(),
                count,
                "{bundle}"
            );
        }
        for none in ["", "\u{feff}", "no certificate", "-----BEGIN CERTIFICAT"] {
            assert_eq!(roots(none.as_bytes()).unwrap_err(), Error::None, "{none}");
        }
    }

    #[test]
    fn a_key_is_read_after_a_byte_order_mark_and_after_certificates() {
        let made = generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = made.signing_key.serialize_pem();

        for text in [
            key.clone(),
            format!("\u{feff}{key}"),
            format!("\u{feff}{}\u{feff}{key}", pem()),
        ] {
            assert!(private_key(text.as_bytes()).is_some(), "{text}");
        }
        assert!(private_key(pem().as_bytes()).is_none());
    }
}
