// Builds dist/: the bundles, 'use client' in each that uses React, and the types.
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { minify } from 'terser';
import { build } from 'vite';

// Properties by which the parts of the client know each other. No user sees them, and none is on the wire or of
// the browser: in dist/client.js, which has nothing but the client, they get short names.
const INTERNAL = new RegExp(
  `^(${[
    'ackAgain acks at before down end failed finish first flush heard isBegun isOpen isSent json link lost need',
    'opened options plan receive received refused released request seen sendText settle start stop timer until up',
  ]
    .join(' ')
    .replaceAll(' ', '|')})$`,
);

const shrink = async (path, code) => {
  const properties = path === 'dist/client.js' && { regex: INTERNAL, builtins: true };
  const compress = { passes: 3, unsafe_arrows: true, keep_fargs: false, pure_getters: true, inline: 3 };
  const result = await minify(code, {
    module: true,
    ecma: 2022,
    compress,
    mangle: { toplevel: true, properties },
  });
  return result.code;
};

process.chdir(join(import.meta.dirname, '..'));
await build({ logLevel: 'warn' });

for (const name of readdirSync('dist', { recursive: true })) {
  const path = join('dist', name);
  // The fake server runs in tests alone, where people may want to read it.
  if (!path.endsWith('.js') || path.endsWith('testing.js')) continue;
  const code = readFileSync(path, 'utf8');
  const head = /\bfrom\s*["']react["'/]/.test(code) ? "'use client';\n" : '';
  writeFileSync(path, head + (await shrink(path, code)));
}

execFileSync('node_modules/.bin/tsc', ['-p', 'tsconfig.build.json'], { stdio: 'inherit' });
